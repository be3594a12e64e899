"""How a checkpoint's files hold their numbers: plainly, as fp8 or GGUF, or in a way not read here, which is named.

Looks at headers, and at the few bytes in which ComfyUI marks a layer. What it finds, `diffusion.convert` widens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import bounded
from hub import gguf_header
from hub.checkpoint import Header, Tensor, UnusableError, read_header

PLAIN_DTYPES = ("BF16", "F16", "F32", "F64")
FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
# ComfyUI's names for formats (comfy/quant_ops.py, QUANT_ALGOS); a scale for each row is a converter's own extension.
FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise", "float8_e5m2_rowwise")

# What lies beside a packed weight X.weight: ComfyUI's names as of 2025-10, and before.
SCALES = (".weight_scale", ".scale_weight")
_NO_WEIGHTS = (*SCALES, ".input_scale", ".scale_input", ".comfy_quant")
_WHOLE_FILE_MARK = "scaled_fp8"
_MARK = ".comfy_quant"
_LONGEST_MARK = 4_096  # bytes of one layer's marker; real ones have some 30
_METADATA = "_quantization_metadata"

# Ends of names that tell of other ways, the more telling first.
_TELLING: tuple[tuple[tuple[str, ...], str], ...] = (
    ((".weight_scale_2",), "nvfp4"),
    ((".wscales", ".smooth_factor"), "SVDQuant"),
    ((".absmax", ".quant_map", ".bitsandbytes__nf4", ".bitsandbytes__fp4", ".SCB"), "bitsandbytes"),
    ((".qweight", ".qzeros", ".g_idx"), "GPTQ or AWQ"),
    ((".weight_packed", ".weight_global_scale"), "compressed-tensors"),
    ((".pre_quant_scale",), "smoothed fp8"),
)
# The same where there is a weight beside them: a norm of another model may have a `scale` of its own.
_TELLING_BESIDE_WEIGHTS = ((".scale", ".zero_point", ".svd_up", ".svd_down"), "SDNQ")
_TELLING_DTYPES = {"I8": "int8", "U8": "4 or 8 bits in bytes", "F4": "fp4", "F8_E8M0": "mxfp8"}


@dataclass(frozen=True)
class Stored:
    """How a model's files hold its weights.

    Attributes:
        tensors: the weights, by their names in the files; what only describes others is left out.
        scales: by a weight's name, the tensor that it has to be multiplied by: one number, or one for each row.
        metadata: what the files say about themselves.
    """

    tensors: Mapping[str, Tensor]
    scales: Mapping[str, str]
    metadata: Mapping[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def numbers(self) -> int:
        """How many numbers the weights are."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def dtype(self) -> str:
        """What most of the numbers are stored as, by its name in a header."""
        numbers = Counter[str]()
        for tensor in self.tensors.values():
            numbers[tensor.dtype] += math.prod(tensor.shape)
        return numbers.most_common(1)[0][0] if numbers else ""

    @property
    def packed(self) -> bool:
        """Whether weights have to be widened before anything can be computed with them."""
        return any(tensor.dtype not in PLAIN_DTYPES for tensor in self.tensors.values())

    @property
    def title(self) -> str:
        """What most of the numbers are stored as, by the name that people use."""
        if self.dtype in FP8_DTYPES:
            return "fp8, scaled" if self.scales else "fp8"
        return {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}.get(self.dtype, self.dtype)


def header_of(file: Path) -> Header:
    """Read a checkpoint's header, whatever its format; kept for next time.

    Raises:
        UnusableError: it is not whole, or no checkpoint.
        OSError: it cannot be read.
    """
    return gguf_header.read_header(file) if file.suffix.lower() == gguf_header.SUFFIX else read_header(file)


def stored(files: Sequence[Path]) -> Stored:
    """Return how files hold a model.

    Raises:
        UnusableError: one is not whole, or packed in a way that is not read here.
        OSError: one cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        header = header_of(file)
        if name := _other_packing(file, header):
            text = (
                "{file} is packed as {packing}, which is not read here; the same model in bf16, fp16, fp32, fp8 or as "
                "a GGUF is"
            )
            raise UnusableError(text, file=file, packing=name)
        tensors |= header.tensors
        metadata |= header.metadata
    scales = {f"{name.removesuffix(end)}.weight": name for name in tensors for end in SCALES if name.endswith(end)}
    weights = {name: tensor for name, tensor in tensors.items() if not _describes(name)}
    scales = {weight: scale for weight, scale in scales.items() if weight in weights}
    for weight, scale in scales.items():
        _check_scale(files[0], weight, weights[weight], tensors[scale])
    return Stored(weights, scales, metadata)


def _describes(name: str) -> bool:
    """Whether a tensor is no weight, but says something about others."""
    return name.endswith(_NO_WEIGHTS) or name.rpartition(".")[2] == _WHOLE_FILE_MARK


def _other_packing(file: Path, header: Header) -> str | None:
    """Return the name of the way that a file is packed in, where it is none that can be read."""
    for ends, packing in _TELLING:
        if any(name.endswith(ends) for name in header.tensors):
            return packing
    for conf in _marks(file, header):
        packing = str(conf.get("format"))
        params = conf.get("params")
        turned = conf.get("convrot") or (isinstance(params, dict) and params.get("convrot"))
        if packing not in FP8_FORMATS or turned:
            return f"{packing} with convrot" if turned else packing[:80]
    beside, by = _TELLING_BESIDE_WEIGHTS
    if any(name.endswith(beside) and f"{name.rpartition('.')[0]}.weight" in header.tensors for name in header.tensors):
        return by
    for name, tensor in header.tensors.items():
        if name.endswith((".weight", *SCALES)) and tensor.dtype in _TELLING_DTYPES:
            return _TELLING_DTYPES[tensor.dtype]
    return None


def _marks(file: Path, header: Header) -> Iterator[Mapping[str, Any]]:
    """Yield what ComfyUI has written about layers: as a tensor beside each, or as an entry of the metadata.

    Raises:
        UnusableError: it cannot be read, so that nobody knows what the numbers mean.
    """
    try:
        if _METADATA in header.metadata:
            layers = bounded.loads(header.metadata[_METADATA])["layers"].values()
            yield from ({"format": conf} if isinstance(conf, str) else dict(conf) for conf in layers)
        marks = [tensor for name, tensor in header.tensors.items() if name.endswith(_MARK)]
        with open(file, "rb") as opened:
            for tensor in marks:
                if tensor.end - tensor.begin > _LONGEST_MARK:
                    raise ValueError("too long")
                opened.seek(header.data_start + tensor.begin)
                text = opened.read(tensor.end - tensor.begin).rstrip(b"\0")
                yield dict(bounded.loads(text.decode()))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UnusableError("{file} says in a way that cannot be read how it is packed", file=file) from None


def _check_scale(file: Path, name: str, weight: Tensor, scale: Tensor) -> None:
    """Refuse a scale that is not for fp8 numbers, or not one for a whole weight or each of its rows."""
    rows = weight.shape[0] if weight.shape else 1
    whole = math.prod(scale.shape) == 1 or scale.shape in ((rows,), (rows, 1))
    if weight.dtype not in FP8_DTYPES or scale.dtype not in PLAIN_DTYPES or not whole:
        text = "{file} has a scale of shape {shape} ({scale}) for {tensor} ({dtype}), which is not read here"
        shape = " x ".join(map(str, scale.shape))
        raise UnusableError(text, file=file, shape=shape, scale=scale.dtype, tensor=name, dtype=weight.dtype)
