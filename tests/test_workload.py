"""Work of a request: held against the published figures, and growing with what makes it larger."""

import pytest

import workload

MEGAPIXEL = 1024**2


@pytest.mark.parametrize(
    ("found", "known"),
    [
        (8 * workload.step_tflop(MEGAPIXEL), 449),
        (workload.step_tflop(4 * MEGAPIXEL), 320),
        (MEGAPIXEL * workload.VAE_DECODE, 10.4),
        (MEGAPIXEL * workload.VAE_ENCODE, 4.9),
        (512**2 * workload.REAL_ESRGAN, 9.4),
        (workload.generate_tflop(MEGAPIXEL, 25, guided=True), 3.5 * 800),
    ],
    ids=["turbo", "2048", "decode", "encode", "real-esrgan", "base"],
)
def test_it_agrees_with_what_is_known(found: float, known: float) -> None:
    assert found == pytest.approx(known, rel=0.02)


def test_more_to_do_is_more_work() -> None:
    plain = workload.generate_tflop(MEGAPIXEL, 9)
    control = workload.generate_tflop(MEGAPIXEL, 9, control=True)
    assert control / plain == pytest.approx(1.57, rel=0.03)
    assert workload.generate_tflop(MEGAPIXEL, 18) > 1.9 * plain
    assert workload.generate_tflop(MEGAPIXEL, 9, guided=True) > 1.9 * plain
    assert workload.generate_tflop(4 * MEGAPIXEL, 9) > 4 * plain  # attention grows with the square


def test_upscale_counts_what_comes_out_and_redraws_large_pictures_in_tiles() -> None:
    small, large = workload.upscale_tflop(MEGAPIXEL, 5), workload.upscale_tflop(16 * MEGAPIXEL, 5)
    assert 16 * small < large < 16 * workload.TILE_OVERLAP * small
    assert workload.upscale_tflop(MEGAPIXEL, 0) == pytest.approx(9.4, rel=0.01)  # the enlargement alone
