"""Variety: seeds that look less alike, by a prompt's embedding that each seed changes a little in the first steps.

Turbo was distilled to need eight steps, and what it draws of one prompt hardly depends on the noise that it begins
with. The first steps lay a picture out, so that a change of the prompt there changes the layout; the others draw what
was asked for.
"""

from __future__ import annotations

import math

import torch

SHARE = 0.25  # of the steps: two of Turbo's eight
STREAM = 1 << 32  # added to the seed, so that this noise is not the beginning of the picture's own


def varied(embedding: torch.Tensor, variety: float, seed: int) -> torch.Tensor:
    """Return an embedding whose numbers are each multiplied by normal noise around 1.

    Multiplied, since a few of a text encoder's numbers are hundreds of times as large as the rest.

    Args:
        embedding: of a prompt, [tokens, width].
        variety: the noise's deviation, 0 to 1.
        seed: of the CPU's generator, so that it is the same on every device.
    """
    generator = torch.Generator().manual_seed(seed + STREAM)
    noise = torch.randn(embedding.shape, generator=generator)
    return embedding * (1 + variety * noise).to(embedding)


def varied_steps(steps: int) -> int:
    """Return how many steps, from the first, see the changed embedding: at least one, and never all of several."""
    return max(1, math.floor(SHARE * steps))
