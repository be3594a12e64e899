"""Latents of images are kept within a number of bytes, by all that they depend on."""

import pytest
import torch
from PIL import Image

from diffusion import encoded_images
from diffusion.encoded_images import EncodedImages, key_of
from mini.models import MiniVAEEncoder


def test_only_so_many_bytes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.zeros(1, 16, 4, 4)
    monkeypatch.setattr(encoded_images, "KEPT_BYTES", 2 * latents.nbytes + 1)
    kept = EncodedImages()
    for name in ("first", "second", "third"):
        assert kept.put(name, latents) is latents
    assert len(kept) == 2
    assert kept.get("first") is None
    assert kept.get("third") is latents


def test_whatever_latents_depend_on_is_in_their_key() -> None:
    encoder, image = MiniVAEEncoder(), Image.new("RGB", (16, 32))
    changed, turned = image.copy(), Image.new("RGB", (32, 16))
    changed.putpixel((3, 4), (0, 0, 1))
    keys = [
        key_of(encoder, *what) for what in ((image,), (changed,), (turned,), ((16, 32),), (image, 64), (image, None))
    ]
    keys.append(key_of(encoder.bfloat16(), image))
    assert len(set(keys)) == len(keys)
    assert key_of(encoder, image.copy()) == keys[-1]
