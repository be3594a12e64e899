"""The latents of the images encoded last: another seed of the same image encodes nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable

import torch
from cachetools import LRUCache
from PIL import Image

KEPT_BYTES = 64 << 20  # an image of 1024 x 1024 is half a megabyte in bf16, one of 4096 x 4096, the largest, 8


class EncodedImages:
    """Latents, each by all that it depends on, as far as KEPT_BYTES go."""

    def __init__(self) -> None:
        self._kept: LRUCache[Hashable, torch.Tensor] = LRUCache(KEPT_BYTES, getsizeof=lambda latents: latents.nbytes)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> torch.Tensor | None:
        """Return what was put under a key, while it is there."""
        return self._kept.get(key)

    def put(self, key: Hashable, latents: torch.Tensor) -> torch.Tensor:
        """Keep latents for a while, and return them."""
        self._kept[key] = latents
        return latents


def key_of(encoder: torch.nn.Module, image: Image.Image | tuple[int, int], *how: Hashable) -> Hashable:
    """Return all that latents depend on.

    Args:
        encoder: whose numbers never change, but whose dtype does in safe mode.
        image: RGB; of a blank one its width and height.
        how: how it is cut into tiles.
    """
    dtype = next(encoder.parameters()).dtype
    if isinstance(image, tuple):
        return dtype, image, how
    return dtype, image.size, hashlib.sha256(image.tobytes()).digest(), how
