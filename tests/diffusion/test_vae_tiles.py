"""The VAE in tiles covers an image wholly, blends without seams, and leaves what needs no tiles as it is."""

import pytest
import torch

from diffusion import vae_tiles
from diffusion.pipeline import Pipeline
from diffusion.vae_tiles import finished


@pytest.mark.parametrize("shape", [(96, 96), (128, 100), (50, 300), (256, 256)])
def test_what_acts_on_each_place_alone_is_the_same_in_tiles(shape: tuple[int, int]) -> None:
    latents = torch.randn(1, 16, *shape, generator=torch.Generator().manual_seed(0))

    def decoder(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(x[:, :3], scale_factor=8, mode="nearest")

    torch.testing.assert_close(finished(vae_tiles.decode(decoder, latents)), decoder(latents), atol=1e-5, rtol=1e-5)


def test_an_encoders_tiles_lie_on_its_grid() -> None:
    picture = torch.randn(1, 3, 1024, 1808, generator=torch.Generator().manual_seed(0))

    def encoder(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(x, 8)

    torch.testing.assert_close(finished(vae_tiles.encode(encoder, picture)), encoder(picture), atol=1e-5, rtol=1e-5)


def test_the_result_has_the_halfs_own_dtype_and_each_tile_is_counted() -> None:
    latents = torch.ones(1, 16, 20, 36, dtype=torch.bfloat16)
    work = vae_tiles.decode(lambda x: torch.nn.functional.interpolate(x[:, :3], scale_factor=8), latents, 16, 4)
    told = []
    while True:
        try:
            told.append(next(work))
        except StopIteration as done:
            decoded = done.value
            break
    assert told == [(index, 6) for index in range(1, 7)]
    assert decoded.dtype == torch.bfloat16
    assert decoded.shape == (1, 3, 160, 288)
    assert (decoded == 1).all()


def test_the_miniatures_own_decoder_shows_no_seams(pipeline: Pipeline) -> None:
    decoder = pipeline.pipe.vae_decoder
    smooth = torch.nn.functional.interpolate(
        torch.randn(1, 16, 5, 7, generator=torch.Generator().manual_seed(2)), size=(40, 56), mode="bilinear"
    )
    with torch.no_grad():
        whole = decoder(smooth)
        tiles = finished(vae_tiles.decode(decoder, smooth, side=24, overlap=8))
    # Group norms see a tile instead of the whole, so the images differ a little; a seam would differ much.
    assert (whole - tiles).abs().mean() < 0.1
    jumps = tiles.diff(dim=-1).abs()
    assert jumps.max() < 2 * whole.diff(dim=-1).abs().max() + 0.1


def test_the_plan_decides_where_tiles_begin(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def noted(name: str) -> None:
        real = getattr(vae_tiles, name)

        def counted(half: torch.nn.Module, inputs: torch.Tensor) -> object:
            used.append(name)
            return real(half, inputs)

        monkeypatch.setattr(vae_tiles, name, counted)

    noted("encode")
    noted("decode")
    pipe = pipeline.pipe
    latents, picture = torch.zeros(1, 16, 16, 16), torch.zeros(1, 3, 128, 128)
    with torch.no_grad():
        for above, count in ((None, 0), (128 * 128, 0), (128 * 128 - 1, 2)):
            monkeypatch.setattr(pipe, "tiled_vae_above", above)  # a setting of the real pipeline, put back afterwards
            pipe.in_tiles(pipe.vae_decoder, latents)
            pipe.in_tiles(pipe.vae_encoder, picture)
            assert len(used) == count
    assert used == ["decode", "encode"]
