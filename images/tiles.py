"""Cutting an image into overlapping tiles and putting them together again without seams.

Everything is separable: where tiles lie and how much each counts is decided for width and height apart, and a tile's
weight at a point is the product of the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Span = tuple[int, int]  # from, to (exclusive)


@dataclass(frozen=True)
class Tile:
    """One tile: where it lies, and how much it counts at each of its columns and rows.

    The weights of all tiles at one point sum to 1.
    """

    x: Span
    y: Span
    across: np.ndarray
    down: np.ndarray

    @property
    def weight(self) -> np.ndarray:
        """Return how much the tile counts at each of its points, float32, [height, width]."""
        product: np.ndarray = self.down[:, None] * self.across[None, :]
        return product


def grid(size: tuple[int, int], side: int, overlap: int, margin: int = 0, step: int = 1, scale: int = 1) -> list[Tile]:
    """Cover an image with tiles, row by row.

    Args:
        size: width and height; whole steps.
        side: the most that a tile is wide and high; whole steps.
        overlap: the least that neighbours share; whole steps, less than `side`.
        margin: how much of a tile, where it has a neighbour, counts for nothing: what is computed so near to the edge
            of what a tile sees is wrong. Twice that is less than `overlap`.
        step: tiles begin at whole steps.
        scale: the weights are for tiles that have been enlarged so much.
    """
    columns, rows = (spans(length, side, overlap, step) for length in size)
    across, down = (ramps(along, overlap, margin, scale) for along in (columns, rows))
    return [
        Tile(x, y, weight_x, weight_y)
        for y, weight_y in zip(rows, down, strict=True)
        for x, weight_x in zip(columns, across, strict=True)
    ]


def spans(length: int, side: int, overlap: int, step: int = 1) -> list[Span]:
    """Cover `length` with spans of `side` that overlap by at least `overlap`, evenly; one span where it is enough."""
    if length <= side:
        return [(0, length)]
    count = math.ceil((length - overlap) / (side - overlap))
    starts = [index * (length - side) // step // (count - 1) * step for index in range(count)]
    return [(start, start + side) for start in starts]


def ramps(along: Sequence[Span], overlap: int, margin: int = 0, scale: int = 1) -> list[np.ndarray]:
    """Return each span's weights, rising and falling where it has neighbours; at each place they sum to 1."""
    first, last = along[0][0] * scale, along[-1][1] * scale
    rise = scale * (overlap - 2 * margin)
    weights = []
    for begin, end in ((begin * scale, end * scale) for begin, end in along):
        places = np.arange(begin, end, dtype=np.float32) + 0.5 - scale * margin
        up = np.ones_like(places) if begin == first else np.clip((places - begin) / rise, 0, 1)
        falling = end - scale * 2 * margin - places
        down = np.ones_like(places) if end == last else np.clip(falling / rise, 0, 1)
        weights.append(np.minimum(up, down))
    total = np.zeros(last - first, np.float32)
    for (begin, end), weight in zip(along, weights, strict=True):
        total[begin * scale - first : end * scale - first] += weight
    return [
        weight / total[begin * scale - first : end * scale - first]
        for (begin, end), weight in zip(along, weights, strict=True)
    ]


class Canvas:
    """An image under construction. Points are kept in float32 until all tiles are there."""

    def __init__(self, size: tuple[int, int]) -> None:
        width, height = size
        self._pixels = np.zeros((height, width, 3), np.float32)

    def add(self, tile: Tile, pixels: np.ndarray, scale: int = 1) -> None:
        """Lay down a tile, float32 in 0..255, [height, width, 3], enlarged by `scale`."""
        (left, right), (top, bottom) = tile.x, tile.y
        place = self._pixels[top * scale : bottom * scale, left * scale : right * scale]
        place += pixels * tile.weight[:, :, None]

    def finished(self) -> np.ndarray:
        """Return the image, uint8, [height, width, 3]; the canvas is used up."""
        np.rint(self._pixels, out=self._pixels)
        np.clip(self._pixels, 0, 255, out=self._pixels)
        return self._pixels.astype(np.uint8)
