"""Real-ESRGAN in tiles: any RGB image to exactly twice its width and height.

Networks that enlarge by 4 are halved again by a good filter, tile by tile, so that no image of four times the size is
ever in memory. Networks are read by spandrel, which knows their architectures from their weights. Importing this module
imports torch.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from functools import lru_cache

import numpy as np
import spandrel  # type: ignore[import-untyped]  # spandrel brings no types
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

import upscaler.weights
from core.errors import RequestError
from core.events import TileDone
from core.messages import Message
from core.request import UPSCALER_OVERLAP
from images import tiles
from upscaler.weights import Source

log = logging.getLogger(__name__)

SCALE = 2  # what comes out, whatever the network's own
# Pixels at a tile's edge that only give its inside something to look at; over the rest of what neighbours share, they
# are blended. The networks look further in principle, hardly in effect: bench/README.md has what this leaves.
MARGIN = 16
STAGE = "upscaling"


@lru_cache(maxsize=2)
def load(source: Source, device: str) -> spandrel.ImageModelDescriptor:
    """Load a network onto a torch device: in fp16 on CUDA where the network allows it, else in fp32.

    fp16 is what Real-ESRGAN's own program computes in on a card, and what the package's weights are kept in; how far it
    is from fp32 is not measured here yet. bf16 would have three bits less.

    Raises:
        RequestError: the file holds no network that enlarges RGB images by 2 or by 4.
        WeightsMissing: the package is not what it should be.
    """
    model = _read(source).eval().to(device)
    model.model.requires_grad_(False)
    if device == "cuda" and model.supports_half:
        model.half()
    log.info("loaded %s (%s) from %s", source.title, model.architecture.name, source.file or "the package")
    return model


def _read(source: Source) -> spandrel.ImageModelDescriptor:
    if source.packaged is not None:
        arrays = upscaler.weights.decoded(source.packaged)
        return _recognised(source, {name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
    assert source.file is not None  # a source is one or the other
    try:
        if source.file.suffix.lower() == ".safetensors":
            state = load_file(source.file)
        else:  # only tensors: a pickle could run anything otherwise
            state = torch.load(source.file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file leads torch into
        raise _refused(source, Message("unreadable", "it cannot be read ({error})", error=str(error))) from error
    return _recognised(source, spandrel.canonicalize_state_dict(state))


def _recognised(source: Source, state: dict[str, torch.Tensor]) -> spandrel.ImageModelDescriptor:
    try:
        model = spandrel.ModelLoader().load_from_state_dict(state)
    except (spandrel.UnsupportedModelError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        why = Message("unknown_network", "spandrel does not know what it holds")
        raise _refused(source, why) from error
    if not isinstance(model, spandrel.ImageModelDescriptor):
        raise _refused(source, Message("mask", "it works with a mask"))
    if model.scale not in (2, 4) or (model.input_channels, model.output_channels) != (3, 3):
        text = "it enlarges by {scale}, with {inputs} to {outputs} channels"
        values = {"scale": model.scale, "inputs": model.input_channels, "outputs": model.output_channels}
        raise _refused(source, Message("other_scale", text, **values))
    return model


def _refused(source: Source, why: Message) -> RequestError:
    text = "a network that enlarges RGB pictures by 2 or 4, as a file that spandrel reads; of this one, {why}"
    return RequestError(upscaler.weights.SETTING, source.file and source.file.name, Message("network", text, why=why))


def enlarge(
    image: Image.Image, model: spandrel.ImageModelDescriptor, side: int
) -> Generator[TileDone, None, Image.Image]:
    """Enlarge an image to twice its width and height; an event after each tile.

    Args:
        image: RGB.
        model: what `load` gave.
        side: a tile's width and height in pixels of `image`, more than UPSCALER_OVERLAP; the memory needed grows with
            its square, see `diffusion.memory.UPSCALER_BYTES_PER_PIXEL`.

    Returns:
        RGB, as the generator's return value.
    """
    pixels = np.asarray(image)
    cut = tiles.grid(image.size, side, UPSCALER_OVERLAP, MARGIN, scale=SCALE)
    canvas = tiles.Canvas((image.width * SCALE, image.height * SCALE))
    for index, tile in enumerate(cut):
        part = np.ascontiguousarray(pixels[slice(*tile.y), slice(*tile.x)])
        canvas.add(tile, twice(part, model), SCALE)
        yield TileDone(STAGE, index + 1, len(cut))
    return Image.fromarray(canvas.finished())


def twice(pixels: np.ndarray, model: spandrel.ImageModelDescriptor) -> np.ndarray:
    """Enlarge uint8 [height, width, 3] to float32 in about 0..255, [2 height, 2 width, 3], all at once."""
    height, width, _ = pixels.shape
    with torch.inference_mode():
        large = _run(pixels, model)
        if model.scale != SCALE:
            if large.device.type == "mps":  # which lacks the filter
                large = large.cpu()
            size = (height * SCALE, width * SCALE)
            large = F.interpolate(large, size, mode="bicubic", antialias=True)
        enlarged: np.ndarray = (large[0].permute(1, 2, 0) * 255).cpu().numpy()
        return enlarged


def shown_large(image: Image.Image, model: spandrel.ImageModelDescriptor) -> Image.Image:
    """Enlarge a small RGB image all at once, as much as the network does by itself."""
    with torch.inference_mode():
        large = _run(np.asarray(image), model)[0].permute(1, 2, 0).clamp(0, 1)
        return Image.fromarray((large * 255).round().byte().cpu().numpy())


def _run(pixels: np.ndarray, model: spandrel.ImageModelDescriptor) -> torch.Tensor:
    """Return what the network makes of uint8 [height, width, 3]: float32 in about 0..1, [1, 3, height, width]."""
    values = torch.from_numpy(pixels.copy()).to(model.device, model.dtype).permute(2, 0, 1)[None] / 255
    large: torch.Tensor = model(values).float()
    return large
