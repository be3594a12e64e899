"""The VAE in tiles: a large picture decoded or encoded piece by piece, where memory does not suffice for all of it.

DiffSynth's own tiles leave out what does not fill a whole stride at the right and bottom edges, and divide nothing by
nothing there. Imports no torch: it works on the tensors it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TILE = 96  # latents a side: 768 pixels, so that the group norms see most of what they saw in training
OVERLAP = 16  # latents: what a decoder's convolutions reach is less


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles begin that cover `length` evenly, the last one ending exactly at its end."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(index * (length - tile) / (count - 1)) for index in range(count)]


def tiled(
    function: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, tile: int = TILE, overlap: int = OVERLAP
) -> torch.Tensor:
    """Apply a function that scales its input evenly, tile by tile, and blend the overlaps.

    Args:
        function: [B, C, h, w] -> [B, D, s h, s w], as a VAE's decoder (s = 8) or encoder (s = 1 / 8).
        inputs: [B, C, H, W]; for an encoder H and W multiples of 8.
        tile: a tile's side, in the input's pixels.
        overlap: what neighbours share at least, in the input's pixels.
    """
    height, width = inputs.shape[-2:]
    ys, xs = starts(height, tile, overlap), starts(width, tile, overlap)
    step = 8 if tile % 8 == 0 and height % 8 == 0 and width % 8 == 0 else 1  # an encoder's tiles begin on its grid
    total = weights = None
    for y in (value // step * step for value in ys):
        for x in (value // step * step for value in xs):
            part = inputs[..., y : min(y + tile, height), x : min(x + tile, width)]
            result = function(part)
            scale = result.shape[-1] / part.shape[-1]
            if total is None:
                shape = (*result.shape[:-2], round(height * scale), round(width * scale))
                total, weights = result.new_zeros(shape).float(), result.new_zeros(shape[-2:]).float()
            top, left = round(y * scale), round(x * scale)
            place = (..., slice(top, top + result.shape[-2]), slice(left, left + result.shape[-1]))
            fade = _fade(result, max(1, round(overlap * scale)))
            total[place] += result.float() * fade
            weights[place[1:]] += fade
    return (total / weights).to(result.dtype)


def _fade(result: torch.Tensor, border: int) -> torch.Tensor:
    """Return weights that rise from a tile's edges to 1 over the border, [h, w], nowhere zero."""
    height, width = result.shape[-2:]
    rows, columns = (result.new_ones(side).float().cumsum(0) for side in (height, width))
    ramps = [values.minimum(values.flip(0)).div(border).clamp(max=1) for values in (rows, columns)]
    return ramps[0][:, None] * ramps[1][None, :]
