"""Shapes: every one is possible with the weights in use, and near the native area; smaller ones keep the shape."""

from core.sizes import IMAGE_SIZES, RATIOS, shape_of, shapes, smaller


def test_every_shape_is_possible_and_of_the_native_area() -> None:
    full = IMAGE_SIZES["full"]
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
    assert shapes(IMAGE_SIZES["mini"]) == {"1:1": (128, 128)}


def test_a_smaller_size_has_the_same_shape_and_about_half_the_area() -> None:
    full = IMAGE_SIZES["full"]
    assert smaller(1024, 1024, full) == (768, 768)
    assert smaller(1360, 768, full) == (1024, 576)
    assert smaller(384, 2048, full) == (384, 1536)  # a side at its end stays
    assert smaller(384, 384, full) is None
    assert smaller(128, 128, IMAGE_SIZES["mini"]) is None
