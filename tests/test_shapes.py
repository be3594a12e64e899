"""Shapes: every one is possible with the weights in use, and near the native area."""

from request import SIZES
from shapes import RATIOS, shape_of, shapes


def test_every_shape_is_possible_and_of_the_native_area() -> None:
    full = SIZES["full"]
    found = shapes(full)
    assert list(found) == [f"{across}:{down}" for across, down in RATIOS]
    for ratio, (width, height) in found.items():
        across, down = map(int, ratio.split(":"))
        assert (width, height) == (full.nearest(width), full.nearest(height))
        assert abs(width * height / full.native**2 - 1) < 0.04
        assert abs(width / height / (across / down) - 1) < 0.04
        assert shape_of(width, height, full) == ratio
    assert shape_of(1024, 1040, full) is None


def test_the_miniature_has_one_shape() -> None:
    assert shapes(SIZES["mini"]) == {"1:1": (128, 128)}
