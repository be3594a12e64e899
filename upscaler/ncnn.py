"""Reads the weights of convolutional networks that were saved for the ncnn runtime: a `.param` and a `.bin` file.

The format is ncnn's own (its wiki, "param and model file structure"): the text lists layers in order, the binary holds
their numbers in that order. Of the layers that hold numbers, convolutions and PReLU are known here, which is what
Real-ESRGAN's networks are made of; their names in PyTorch follow from the order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC = "7767517"  # the first line of every .param file
HALF = 0x01306B47  # the tag before weights that are stored as fp16
FULL = 0
# Layers without numbers of their own, which may stand between those with.
_NUMBERLESS = {"Input", "Split", "Concat", "Eltwise", "BinaryOp", "Interp", "PixelShuffle"}


@dataclass(frozen=True)
class Layer:
    """A layer's numbers: a convolution's weight (out, in, height, width) and bias (out), or a PReLU's slopes."""

    kind: str
    weight: np.ndarray
    bias: np.ndarray | None = None


def read(param: Path) -> list[Layer]:
    """Read all layers that hold numbers; the `.bin` file lies beside the `.param` file.

    Raises:
        ValueError: the files are not what is described above, or do not belong together.
    """
    data = param.with_suffix(".bin").read_bytes()
    layers, place = [], 0
    for kind, facts in _described(param):
        if kind == "Convolution":
            outputs, kernel, count = facts[0], facts[1], facts[6]
            weight, place = _weights(data, place, count)
            bias, place = _numbers(data, place, outputs, np.float32)
            layers.append(Layer(kind, weight.reshape(outputs, -1, kernel, kernel), bias))
        else:
            slopes, place = _numbers(data, place, facts[0], np.float32)
            layers.append(Layer(kind, slopes))
    if place != len(data):
        raise ValueError(f"{param.name} describes {place} bytes of weights, and there are {len(data)}")
    return layers


def _described(param: Path) -> Iterator[tuple[str, dict[int, int]]]:
    """Yield kind and whole-numbered facts of each layer that holds numbers."""
    magic, _, *lines = param.read_text(encoding="ascii").splitlines()
    if magic.strip() != MAGIC:
        raise ValueError(f"{param.name} is no .param file of ncnn")
    for line in lines:
        kind, _, inputs, outputs, *rest = line.split()
        if kind in _NUMBERLESS:
            continue
        if kind not in ("Convolution", "PReLU"):
            raise ValueError(f"{param.name} has a layer of the kind {kind}, which is not known here")
        pairs = (fact.split("=") for fact in rest[int(inputs) + int(outputs) :])
        yield kind, {int(key): int(value) for key, value in pairs if not key.startswith("-")}


def _weights(data: bytes, place: int, count: int) -> tuple[np.ndarray, int]:
    """Read `count` weights behind their tag; fp16 ones are padded to whole words."""
    tag, place = _numbers(data, place, 1, np.uint32)
    if tag[0] not in (HALF, FULL):
        raise ValueError(f"weights with the tag {tag[0]:#x}, which is neither fp16 nor fp32")
    weights, place = _numbers(data, place, count, np.float16 if tag[0] == HALF else np.float32)
    return weights, -(-place // 4) * 4


def _numbers(data: bytes, place: int, count: int, kind: type[np.generic]) -> tuple[np.ndarray, int]:
    end = place + count * np.dtype(kind).itemsize
    if end > len(data):
        raise ValueError("the weights end too early")
    return np.frombuffer(data, np.dtype(kind).newbyteorder("<"), count, place), end


def rrdbnet(layers: list[Layer]) -> dict[str, np.ndarray]:
    """Name an RRDBNet's convolutions as Real-ESRGAN's PyTorch files do."""
    blocks, rest = divmod(len(layers) - 6, 15)
    if rest or any(layer.kind != "Convolution" for layer in layers):
        raise ValueError("not the layers of an RRDBNet")
    inner = [f"body.{i}.rdb{j}.conv{k}" for i in range(blocks) for j in (1, 2, 3) for k in (1, 2, 3, 4, 5)]
    names = ["conv_first", *inner, "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]
    return _named(names, layers)


def compact(layers: list[Layer]) -> dict[str, np.ndarray]:
    """Name the layers of an SRVGGNetCompact as Real-ESRGAN's PyTorch files do."""
    return _named([f"body.{index}" for index in range(len(layers))], layers)


def _named(names: list[str], layers: list[Layer]) -> dict[str, np.ndarray]:
    state = {}
    for name, layer in zip(names, layers, strict=True):
        state[f"{name}.weight"] = layer.weight
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias
    return state
