"""Weights as files hold them, widened to what is computed with: tensor by tensor, and large ones row by row.

What is there in the dtype asked for stays mapped to its file. `hub.packing` says what files hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from hub.packing import Stored

BLOCK = 1 << 24  # numbers that are widened at once: 64 MB in fp32


def tensors(files: Sequence[Path], stored: Stored, names: Iterable[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return weights in a dtype, by their names in the files.

    Args:
        files: a model's.
        stored: what they hold.
        names: which weights.
        dtype: what to widen, or narrow, to.

    Raises:
        FileNotFoundError: a file is absent.
    """
    scales = dict(_read(files, set(stored.scales.values())))
    found = {}
    # One at a time, so that what was read for a copy is not kept beside it.
    for name, tensor in _read(files, set(names)):
        scale = stored.scales.get(name)
        found[name] = tensor.to(dtype) if scale is None else scaled(tensor, scales[scale], dtype)
    return found


def _read(files: Sequence[Path], names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors as they are mapped from files."""
    for file in files:
        with safe_open(file, framework="pt") as opened:
            yield from ((name, opened.get_tensor(name)) for name in opened.keys() if name in names)  # noqa: SIM118


def scaled(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return packed numbers times their scale, multiplied in fp32 and rounded once.

    Args:
        packed: [rows, ...], in fp8.
        scale: one number, or one for each row.
        dtype: of the result.
    """
    packed, wide = torch.atleast_1d(packed), torch.empty_like(packed, dtype=dtype)
    factors = scale.float().reshape(-1, *[1] * (packed.ndim - 1)).expand(len(packed), *[1] * (packed.ndim - 1))
    rows = max(1, BLOCK * len(packed) // max(1, packed.numel()))
    for first in range(0, len(packed), rows):
        block = slice(first, first + rows)
        wide.view(packed.shape)[block] = packed[block].float() * factors[block]
    return wide
