"""How much work a request is, in floating-point operations: facts of the models, and nothing of any device.

The figures are of the real weights; the miniature's are thousands of times smaller. Knows nothing of requests, of
devices, or of any front; what a device makes of the work is for the caller to say.
"""

from __future__ import annotations

# From the official shapes: 30 layers, and 2 refiners for the picture's tokens alone, which count as layers here; each
# has 4 projections and a feed-forward of 3 matrices, and attends to every token.
LAYERS = 32
WIDTH = 3840
WEIGHTS_PER_LAYER = 4 * WIDTH**2 + 3 * WIDTH * 10240
TEXT_TOKENS = 96  # of a usual prompt in its chat template
PIXELS_PER_TOKEN = 16**2  # the VAE's factor 8 times the transformer's patch of 2, in each direction

CONTROLNET = 0.57  # of a step, added to it
TEXT_ENCODER = 0.6  # TFLOP for a prompt
VAE_DECODE = 9.9e-6  # TFLOP per pixel: 10.4 for 1024 x 1024
VAE_ENCODE = 4.7e-6  # 4.9 for 1024 x 1024
REAL_ESRGAN = 3.59e-5  # TFLOP per pixel of what it enlarges: 9.4 for 512 x 512

# Upscale redraws a large picture in tiles of about this many pixels, of which neighbours share a quarter of a side.
TILE_PIXELS = 1024**2
TILE_OVERLAP = (4 / 3) ** 2


def step_tflop(pixels: int) -> float:
    """Return the TFLOP of one pass of the transformer over a picture of `pixels`, without guidance or ControlNet."""
    tokens = pixels / PIXELS_PER_TOKEN + TEXT_TOKENS
    return LAYERS * (2 * WEIGHTS_PER_LAYER * tokens + 4 * WIDTH * tokens**2) / 1e12


def generate_tflop(pixels: int, steps: int, *, guided: bool = False, control: bool = False) -> float:
    """Return the TFLOP of text to image, or with `control` of structure to image.

    Args:
        pixels: of the picture, width x height.
        steps: denoising steps.
        guided: whether each step runs twice, for the prompt and for the negative prompt.
        control: whether a ControlNet runs beside the transformer.
    """
    passes = 2 if guided else 1
    step = step_tflop(pixels) * (1 + CONTROLNET * control)
    return passes * (TEXT_ENCODER + steps * step) + pixels * (VAE_DECODE + VAE_ENCODE * control)


def upscale_tflop(pixels: int, steps: int) -> float:
    """Return the TFLOP of making a picture of `pixels` from one of a quarter of them, redrawn in `steps` steps."""
    drawn, tile = pixels, pixels
    if pixels > TILE_PIXELS:
        drawn, tile = pixels * TILE_OVERLAP, TILE_PIXELS
    redraw = TEXT_ENCODER + drawn / tile * steps * step_tflop(tile) + drawn * (VAE_ENCODE + VAE_DECODE)
    return pixels / 4 * REAL_ESRGAN + (redraw if steps else 0.0)
