"""The image that emerges: the projection, its place among the events, and that it heads for the finished image."""

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from core.events import Preview, Result, Step
from core.request import TextToImage
from core.sizes import IMAGE_SIZES, WeightsKind
from diffusion import preview
from engine import Engine


def as_array(made: Preview) -> np.ndarray:
    return np.frombuffer(made.rgb, np.uint8).reshape(made.height, made.width, 3)


@pytest.mark.parametrize("kind", preview.FACTORS)
def test_projection_is_the_published_sum(kind: WeightsKind) -> None:
    factors = preview.FACTORS[kind]
    assert len(factors.channels) == 16
    latents = torch.zeros(1, 16, 2, 3)
    latents[0, 4, 1, 2] = 2.0
    made = preview.project(latents, kind)
    assert (made.width, made.height) == (3, 2)
    pixels = as_array(made)
    expected = (np.array(factors.bias) + 2.0 * np.array(factors.channels[4]) + 1) * 127.5
    assert np.abs(pixels[1, 2] - expected).max() <= 0.5
    assert np.abs(pixels[0, 0] - (np.array(factors.bias) + 1) * 127.5).max() <= 0.5


def test_extreme_latents_stay_colours() -> None:
    pixels = as_array(preview.project(torch.full((1, 16, 4, 4), 1e6, dtype=torch.bfloat16), "full"))
    assert set(np.unique(pixels)) <= {0, 255}


def test_every_step_shows_where_the_image_is_heading(engine: Engine) -> None:
    asked = TextToImage.parse(prompt="a fox on a black background", seed=7)
    *events, result = engine.run(asked)
    steps = [event for event in events if isinstance(event, Step)]
    previews = [step.preview for step in steps if step.preview is not None]
    assert len(previews) == len(steps)
    assert isinstance(result, Result)
    side = IMAGE_SIZES["mini"].native // 8
    assert {(shown.width, shown.height) for shown in previews} == {(side, side)}
    finished = Image.open(io.BytesIO(result.png)).convert("RGB").resize((side, side), Image.Resampling.BOX)
    distances = [np.abs(as_array(shown).astype(int) - np.asarray(finished)).mean() for shown in previews]
    assert distances[-1] < 25  # of 255: the colours of the image, which a wrong sign or a swapped channel would miss
    assert distances[-1] <= distances[0]
    assert pickle.loads(pickle.dumps(steps[0])).preview == steps[0].preview
