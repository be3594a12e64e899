"""Image sizes: which widths and heights given weights can draw, by their ratio, and smaller ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Literal

from core.messages import Message

RATIOS = ((1, 1), (4, 3), (3, 2), (16, 9), (3, 4), (2, 3), (9, 16))


def shapes(sizes: ImageSizes) -> dict[str, tuple[int, int]]:
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


def shape_of(width: int, height: int, sizes: ImageSizes) -> str | None:
    """Return the ratio whose size this is, or None."""
    return next((ratio for ratio, size in shapes(sizes).items() if size == (width, height)), None)


def smaller(width: int, height: int, sizes: ImageSizes) -> tuple[int, int] | None:
    """Return a size of about the same shape and half the area, or None where nothing smaller is possible."""
    less = sizes.nearest(round(width * 0.75)), sizes.nearest(round(height * 0.75))
    return less if less[0] * less[1] < width * height else None


WeightsKind = Literal["full", "mini"]


@dataclass(frozen=True)
class ImageSizes:
    """Possible widths and heights, in pixels: `minimum` to `maximum` in steps of `step`; `native` is the default."""

    minimum: int
    maximum: int
    native: int
    step: int = 16  # the VAE's factor 8 times the transformer's patch of 2

    def nearest(self, value: int) -> int:
        """Return the possible size nearest to `value` (the larger one of two that are equally near)."""
        snapped = (value + self.step // 2) // self.step * self.step
        return min(max(snapped, self.minimum), self.maximum)

    @property
    def text(self) -> Message:
        """What is possible, in words."""
        if self.minimum == self.maximum:
            return Message("one_size", "{size} only", size=self.native)
        text = "{low} to {high} in steps of {step}"
        return Message("sizes", text, low=self.minimum, high=self.maximum, step=self.step)

    def __str__(self) -> str:
        return str(self.text)


# Full: what Z-Image was trained on. Miniature: see weights/mini/README.md.
IMAGE_SIZES: Mapping[WeightsKind, ImageSizes] = {
    "full": ImageSizes(minimum=384, maximum=2048, native=1024),
    "mini": ImageSizes(minimum=128, maximum=128, native=128),
}
IMAGE_SIZES_TEXT = Message(
    "sizes",
    "with the real weights {full}; with the miniature {mini}",
    full=IMAGE_SIZES["full"].text,
    mini=IMAGE_SIZES["mini"].text,
)
