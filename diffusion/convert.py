"""Weights as files hold them, widened to what is computed with: tensor by tensor, and large ones row by row.

What is there in the dtype asked for stays mapped to its file. `hub.packing` says what files hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from hub import gguf_header
from hub.packing import Stored

BLOCK = 1 << 24  # numbers of fp8 that are widened at once: 64 MB in fp32
GGUF_BLOCK = 1 << 18  # of a GGUF file: numpy computes fastest on what fits the processor's cache


def tensors(files: Sequence[Path], stored: Stored, names: Iterable[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return weights in a dtype, by their names in the files.

    Args:
        files: a model's, safetensors or GGUF.
        stored: what they hold.
        names: which weights.
        dtype: what to widen, or narrow, to.

    Raises:
        FileNotFoundError: a file is absent.
    """
    packed = [file for file in files if file.suffix.lower() == gguf_header.SUFFIX]
    others = [file for file in files if file not in packed]
    scales, wanted = dict(_mapped(others, set(stored.scales.values()))), set(names)
    found = {name: tensor for file in packed for name, tensor in _from_gguf(file, wanted, dtype)}
    # One at a time, so that what was read for a copy is not kept beside it.
    for name, tensor in _mapped(others, wanted):
        scale = stored.scales.get(name)
        found[name] = tensor.to(dtype) if scale is None else scaled(tensor, scales[scale], dtype)
    return found


def _mapped(files: Sequence[Path], names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of safetensors files as they are mapped."""
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
    factors = scale.float().reshape(-1, *[1] * (packed.ndim - 1)).expand(len(packed), *[1] * (packed.ndim - 1))
    return _by_rows(packed.shape, dtype, BLOCK, lambda rows: packed[rows].float() * factors[rows])


def _from_gguf(file: Path, names: set[str], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a GGUF file; those that are packed are widened by the package `gguf`."""
    header = gguf_header.read_header(file)
    data = np.memmap(file, np.uint8, "c")  # a write would stay in memory; nobody writes
    for name in names & header.tensors.keys():
        tensor = header.tensors[name]
        held = torch.from_numpy(data[header.data_start + tensor.begin : header.data_start + tensor.end])
        if plain := _PLAIN.get(tensor.dtype):
            yield name, held.view(plain).reshape(tensor.shape).to(dtype)
        else:
            yield name, _unpacked(held.numpy(), tensor.dtype, tensor.shape, dtype)


_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _unpacked(packed: np.ndarray, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers that blocks of ggml's stand for; each block is widened by itself."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    name = kind.removeprefix(gguf_header.PREFIX)
    of, block = GGMLQuantizationType[name], next(known for known in gguf_header.KINDS.values() if known.name == name)
    blocks = packed.reshape(-1, block.bytes)

    def numbers(rows: slice) -> torch.Tensor:
        # As one row: the package loops over rows in Python.
        return torch.from_numpy(dequantize(blocks[rows].reshape(1, -1), of)).reshape(-1, block.numbers)

    return _by_rows((len(blocks), block.numbers), dtype, GGUF_BLOCK, numbers).reshape(shape)


def _by_rows(
    shape: Sequence[int], dtype: torch.dtype, at_once: int, widened: Callable[[slice], torch.Tensor]
) -> torch.Tensor:
    """Return a tensor that is computed `at_once` numbers at a time, so that its wide copy never is there whole."""
    wide = torch.empty(shape, dtype=dtype)
    rows = max(1, at_once * len(wide) // max(1, wide.numel()))
    for first in range(0, len(wide), rows):
        block = slice(first, first + rows)
        wide[block] = widened(block)
    return wide
