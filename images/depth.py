"""The preprocessor "depth": how far away things are in an image, by Depth Anything V2 Small.

The model runs on the processor in fp32 (a second or two), so that it never competes with what draws for memory.
Importing this module imports torch.
"""

from __future__ import annotations

import logging
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

# preprocessor_config.json of depth-anything/Depth-Anything-V2-Small-hf.
_SIDE, _STEP = 518, 14
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LONGEST = 4 * _SIDE  # of a very long image's longer side; attention costs its square


def config() -> DepthAnythingConfig:
    """Return the model's shape (config.json of depth-anything/Depth-Anything-V2-Small-hf)."""
    return DepthAnythingConfig(
        backbone_config=Dinov2Config(  # type: ignore[call-arg]  # transformers' types lack out_features
            hidden_size=384,
            num_attention_heads=6,
            image_size=_SIDE,
            patch_size=_STEP,
            out_features=["stage3", "stage6", "stage9", "stage12"],
            reshape_hidden_states=False,
        ),
        reassemble_hidden_size=384,
        neck_hidden_sizes=[48, 96, 192, 384],
        fusion_hidden_size=64,
        head_hidden_size=32,
        patch_size=_STEP,
    )


def depth(image: Image.Image, weights: Path) -> Image.Image:
    """Return the depth of an RGB image as gray RGB of its size: the nearest white, the farthest black.

    Args:
        image: RGB, any size.
        weights: the model's safetensors file.

    Raises:
        ValueError: the file holds another model.
    """
    shorter, longer = sorted(image.size)
    scale = min(_SIDE / shorter, _LONGEST / longer)
    size = [max(_STEP, round(side * scale / _STEP) * _STEP) for side in image.size]
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32) / 255
    mean, deviation = np.array(_MEAN, np.float32), np.array(_DEVIATION, np.float32)
    normal = torch.from_numpy((pixels - mean) / deviation).permute(2, 0, 1)[None]
    with torch.no_grad():
        near = _model(str(weights), weights.stat().st_mtime_ns)(pixel_values=normal).predicted_depth[0].numpy()
    low, high = float(near.min()), float(near.max())
    if not math.isfinite(high - low):
        raise ValueError(f"{weights} gives no depth")
    gray = Image.fromarray(((near - low) * (255 / max(high - low, 1e-12))).astype(np.uint8))
    return gray.resize(image.size, Image.Resampling.BICUBIC).convert("RGB")


@lru_cache(maxsize=1)
def _model(weights: str, _changed: int) -> DepthAnythingForDepthEstimation:
    path = Path(weights)
    # A pair, because of `output_loading_info`; transformers' types know the model alone.
    answer: Any = DepthAnythingForDepthEstimation.from_pretrained(
        path.parent, config=config(), local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    loaded, info = answer
    if missing := [*info["missing_keys"], *info["mismatched_keys"]]:  # transformers fills these with random numbers
        raise ValueError(f"{path} is not Depth Anything V2 Small: it lacks {missing[0]} and {len(missing) - 1} others")
    logging.getLogger(__name__).info("loaded %s", path)
    model: DepthAnythingForDepthEstimation = loaded.eval()
    return model
