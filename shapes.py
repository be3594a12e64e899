"""Shapes of pictures: the usual ratios of width to height, as sizes that given weights can draw, and smaller ones."""

from __future__ import annotations

from math import sqrt

from request import Sizes

RATIOS = ((1, 1), (4, 3), (3, 2), (16, 9), (3, 4), (2, 3), (9, 16))


def shapes(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Return width and height in pixels by ratio ("4:3"), each of about the native area; only what is possible."""
    found = {}
    for across, down in RATIOS:
        width, height = (
            round(sizes.native * sqrt(one / other) / sizes.step) * sizes.step
            for one, other in ((across, down), (down, across))
        )
        if (width, height) == (sizes.nearest(width), sizes.nearest(height)):
            found[f"{across}:{down}"] = width, height
    return found


def shape_of(width: int, height: int, sizes: Sizes) -> str | None:
    """Return the ratio whose size this is, or None."""
    return next((ratio for ratio, size in shapes(sizes).items() if size == (width, height)), None)


def smaller(width: int, height: int, sizes: Sizes) -> tuple[int, int] | None:
    """Return a size of about the same shape and half the area, or None where nothing smaller is possible."""
    less = sizes.nearest(round(width * 0.75)), sizes.nearest(round(height * 0.75))
    return less if less[0] * less[1] < width * height else None
