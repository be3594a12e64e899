"""Cutting into tiles and putting together again."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from images import tiles


@settings(deadline=None)  # a busy machine is not a fault
@given(length=st.integers(1, 700), side=st.integers(33, 128), margin=st.integers(0, 11))
def test_spans_cover_everything_and_overlap_enough(length: int, side: int, margin: int) -> None:
    overlap = 32
    along = tiles.spans(length, side, overlap)
    assert along[0][0] == 0
    assert along[-1][1] == length
    assert all(end - begin == min(side, length) for begin, end in along)
    assert all(first[1] - second[0] >= overlap for first, second in itertools.pairwise(along))
    total = np.zeros(length)
    for (begin, end), weight in zip(along, tiles.ramps(along, overlap, margin), strict=True):
        assert weight.min() >= 0
        total[begin:end] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_what_lies_at_a_tiles_inner_edge_counts_for_nothing(scale: int) -> None:
    along = tiles.spans(200, 64, 24)
    for index, weight in enumerate(tiles.ramps(along, 24, 8, scale)):
        inner = slice(0, 8 * scale) if index else slice(-8 * scale, None)
        assert len(weight) == 64 * scale
        assert not weight[inner].any()
        assert weight[32 * scale] > 0


def test_spans_begin_at_whole_steps() -> None:
    along = tiles.spans(1200, 512, 128, step=16)
    assert all(begin % 16 == 0 for begin, _ in along)
    assert all(first[1] - second[0] >= 128 for first, second in itertools.pairwise(along))


def test_tiles_that_are_left_as_they_are_give_the_image_again() -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (90, 131, 3)).astype(np.uint8)
    canvas = tiles.Canvas((131, 90))
    cut = tiles.grid((131, 90), 40, 12, margin=3)
    assert len(cut) > 9
    for tile in cut:
        canvas.add(tile, pixels[slice(*tile.y), slice(*tile.x)].astype(np.float32))
    np.testing.assert_array_equal(canvas.finished(), pixels)
