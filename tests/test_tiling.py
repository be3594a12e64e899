"""Tiles cover a picture wholly, blend without seams, and leave what needs no tiles as it is."""

import itertools

import pytest
import torch

import tiling


@pytest.mark.parametrize("length", [1, 16, 95, 96, 97, 128, 129, 200, 255, 256, 512])
def test_tiles_cover_everything_and_overlap(length: int) -> None:
    begins = tiling.starts(length, 96, 16)
    assert begins[0] == 0
    assert begins[-1] + 96 >= length and (length <= 96 or begins[-1] + 96 == length)
    assert all(after - before <= 80 for before, after in itertools.pairwise(begins))


@pytest.mark.parametrize("shape", [(96, 96), (128, 100), (50, 300), (256, 256)])
def test_what_acts_on_each_place_alone_is_the_same_in_tiles(shape: tuple[int, int]) -> None:
    latents = torch.randn(1, 16, *shape, generator=torch.Generator().manual_seed(0))

    def decode(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(x[:, :3], scale_factor=8, mode="nearest")

    torch.testing.assert_close(tiling.tiled(decode, latents), decode(latents), atol=1e-5, rtol=1e-5)


def test_an_encoders_tiles_lie_on_its_grid() -> None:
    picture = torch.randn(1, 3, 1024, 1808, generator=torch.Generator().manual_seed(0))

    def encode(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(x, 8)

    found = tiling.tiled(encode, picture, tiling.TILE * 8, tiling.OVERLAP * 8)
    torch.testing.assert_close(found, encode(picture), atol=1e-5, rtol=1e-5)


def test_the_miniatures_own_decoder_shows_no_seams(pipeline) -> None:
    decoder = pipeline.pipe.vae_decoder
    smooth = torch.nn.functional.interpolate(
        torch.randn(1, 16, 5, 7, generator=torch.Generator().manual_seed(2)), size=(40, 56), mode="bilinear"
    )
    with torch.no_grad():
        whole = decoder(smooth)
        tiles = tiling.tiled(decoder, smooth, tile=24, overlap=8)
    # Group norms see a tile instead of the whole, so the pictures differ a little; a seam would differ much.
    assert (whole - tiles).abs().mean() < 0.1
    jumps = tiles.diff(dim=-1).abs()
    assert jumps.max() < 2 * whole.diff(dim=-1).abs().max() + 0.1


def test_the_plan_decides_where_tiles_begin(pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(tiling, "tiled", lambda half, inputs, *sizes: used.append(sizes) or half(inputs))
    pipe = pipeline.pipe
    latents, picture = torch.zeros(1, 16, 16, 16), torch.zeros(1, 3, 128, 128)
    with torch.no_grad():
        for above, count in ((None, 0), (128 * 128, 0), (128 * 128 - 1, 2)):
            monkeypatch.setattr(pipe, "tiled_vae_above", above)
            pipe.in_tiles(pipe.vae_decoder, latents)
            pipe.in_tiles(pipe.vae_encoder, picture)
            assert len(used) == count
    assert used == [(96, 16), (768, 128)]
