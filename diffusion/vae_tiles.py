"""The VAE in tiles: a large image encoded or decoded piece by piece, where memory does not suffice for all of it.

DiffSynth's own tiles leave out what does not fill a whole stride at the right and bottom edges, and divide nothing by
nothing there. `tiles` cuts and weighs; here it is done to tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, TypeVar

from images import tiles

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

FACTOR = 8  # pixels to a latent, in each direction
STEP = 2  # latents to a token of the transformer: where tiles may begin, so that it can work on the same ones
SIDE = 96  # latents: 768 pixels, so that the group norms see most of what they saw in training
OVERLAP = 16  # latents: what a decoder's convolutions reach is less
REDRAWN_SHARE = 4  # where the transformer works on the same tiles, they share at least a fourth of their side

Half = Callable[["torch.Tensor"], "torch.Tensor"]
Work = Generator[tuple[int, int], None, T]  # yields how many tiles of how many are done


def cut(size: tuple[int, int], side: int, overlap: int, scale: int = 1) -> list[tiles.Tile]:
    """Cut latents, `size` wide and high, into tiles; their weights are for tiles enlarged by `scale`."""
    return tiles.grid(size, side, overlap, step=STEP, scale=scale)


def encode(encoder: Half, images: torch.Tensor, side: int = SIDE, overlap: int = OVERLAP) -> Work[torch.Tensor]:
    """Encode images tile by tile and blend the overlaps.

    Args:
        encoder: [B, C, 8 h, 8 w] -> [B, D, h, w].
        images: [B, C, H, W], H and W multiples of 16.
        side: the most that a tile is wide and high, in latents, even.
        overlap: what neighbours share at least, in latents, even.

    Returns:
        [B, D, H / 8, W / 8], as the generator's return value.
    """
    height, width = (length // FACTOR for length in images.shape[-2:])
    return _blended(encoder, images, cut((width, height), side, overlap), FACTOR, 1)


def decode(decoder: Half, latents: torch.Tensor, side: int = SIDE, overlap: int = OVERLAP) -> Work[torch.Tensor]:
    """Decode latents [B, D, h, w], h and w even, to [B, C, 8 h, 8 w]: `encode` the other way round."""
    height, width = latents.shape[-2:]
    return _blended(decoder, latents, cut((width, height), side, overlap, FACTOR), 1, FACTOR)


def _blended(half: Half, inputs: torch.Tensor, pieces: list[tiles.Tile], taken: int, given: int) -> Work[torch.Tensor]:
    """Apply `half` to each tile; of a latent, `taken` pixels a side go in and `given` come out."""
    total = None
    for index, tile in enumerate(pieces):
        result = half(inputs[at(tile, taken)])
        if total is None:
            right, bottom = pieces[-1].x[1] * given, pieces[-1].y[1] * given
            total = result.new_zeros((*result.shape[:-2], bottom, right)).float()
        total[at(tile, given)] += result.float() * total.new_tensor(tile.weight)
        yield index + 1, len(pieces)
    assert total is not None  # there is one tile at least
    return total.to(result.dtype)


def at(tile: tiles.Tile, scale: int = 1) -> tuple[slice, ...]:
    """Return where a tile lies in a tensor [B, C, height, width] of `scale` times the size."""
    (left, right), (top, bottom) = tile.x, tile.y
    return slice(None), slice(None), slice(top * scale, bottom * scale), slice(left * scale, right * scale)


def finished(work: Work[T]) -> T:
    """Return the result of work, done at once."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            returned: T = done.value
            return returned
