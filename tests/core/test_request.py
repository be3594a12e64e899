"""Requests: what is possible, and the sentence for what is not."""

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import RequestError
from core.events import Failure
from core.request import SEED_MAX, TextToImage
from core.sizes import IMAGE_SIZES, ImageSizes, WeightsKind


def refusal(**values: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        TextToImage.parse(**values)
    return caught.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("prompt", " \n\t"),
        ("prompt", "a" * 10_001),
        ("prompt", 3),
        ("model", "edit"),
        ("steps", 0),
        ("steps", 101),
        ("steps", "8.5"),
        ("steps", math.nan),
        ("steps", math.inf),
        ("cfg", 0.5),
        ("cfg", 20.5),
        ("cfg", math.nan),
        ("cfg", -math.inf),
        ("seed", -2),
        ("seed", SEED_MAX + 1),
        ("seed", "abc"),
        ("width", 0),
        ("height", -16),
        ("weights", "large"),
        ("sampler", "euler"),
    ],
)
def test_bad_value_is_refused_with_field_value_and_what_is_allowed(field: str, value: object) -> None:
    error = refusal(**{"prompt": "a fox", field: value})
    assert error.values["field"] == field
    assert str(error).startswith(f"{field}: ")
    assert "allowed: " in str(error)
    assert error.values["allowed"]
    assert (error.exit_code, error.http_status) == (2, 400)


def test_missing_prompt_is_refused() -> None:
    assert refusal().values["field"] == "prompt"


def test_sentence_stays_short_whatever_the_value() -> None:
    assert len(str(refusal(prompt="x" * 1_000_000))) < 300


@pytest.mark.parametrize("seed", [0, -1, None, "", "0", "-1"])
def test_every_spelling_of_random_picks_a_seed(seed: object) -> None:
    seeds = {TextToImage.parse(prompt="a fox", seed=seed).resolved("mini").seed for _ in range(4)}
    assert len(seeds) > 1
    assert all(1 <= picked <= SEED_MAX for picked in seeds)


def test_given_seed_is_kept() -> None:
    assert TextToImage.parse(prompt="a fox", seed=SEED_MAX).resolved("mini").seed == SEED_MAX


@pytest.mark.parametrize(("model", "steps", "cfg"), [("turbo", 8, 1.0), ("base", 25, 4.0)])
@pytest.mark.parametrize(("kind", "side"), [("full", 1024), ("mini", 128)])
def test_open_values_follow_model_and_weights(model: str, steps: int, cfg: float, kind: WeightsKind, side: int) -> None:
    request = TextToImage.parse(prompt="a fox", model=model).resolved(kind)
    assert (request.steps, request.cfg, request.width, request.height) == (steps, cfg, side, side)


def test_given_values_are_kept() -> None:
    request = TextToImage.parse(prompt="a fox", model="base", steps=3, cfg=1, width=384, height=2048).resolved("full")
    assert (request.steps, request.cfg, request.width, request.height) == (3, 1.0, 384, 2048)


@pytest.mark.parametrize(
    ("kind", "asked", "nearest"), [("full", 1000, 1008), ("full", 100, 384), ("full", 4096, 2048), ("mini", 1024, 128)]
)
def test_impossible_size_names_the_nearest_possible_one(kind: WeightsKind, asked: int, nearest: int) -> None:
    with pytest.raises(RequestError) as caught:
        TextToImage.parse(prompt="a fox", width=asked).resolved(kind)
    assert caught.value.values["nearest"] == nearest
    assert f"the nearest is {nearest}" in str(caught.value)


@given(st.integers(0, 5000))
def test_nearest_size_is_possible_and_none_is_nearer(value: int) -> None:
    sizes = IMAGE_SIZES["full"]
    nearest = sizes.nearest(value)
    possible = range(sizes.minimum, sizes.maximum + 1, sizes.step)
    assert nearest in possible
    assert abs(nearest - value) == min(abs(other - value) for other in possible)


def test_guidance_is_refused_where_it_means_nothing() -> None:
    for field, value in (("cfg", 4), ("negative_prompt", "blurry")):
        request = TextToImage.parse(prompt="a fox", model="turbo", **{field: value})
        with pytest.raises(RequestError, match=f"^{field}: "):
            request.resolved("full")


@pytest.mark.parametrize("cfg", [0, 0.0, -0.0, "0", "0.0"])
@pytest.mark.parametrize("model", ["turbo", "base"])
def test_a_cfg_of_zero_is_off_like_one(model: str, cfg: object) -> None:
    assert TextToImage.parse(prompt="a fox", model=model, cfg=cfg).resolved("mini").cfg == 1
    assert TextToImage.check("cfg", cfg) == 1


def test_request_is_frozen_and_survives_pickling_and_json() -> None:
    request = TextToImage.parse(prompt="a fox", seed=7).resolved("mini")
    with pytest.raises(ValueError, match="frozen"):
        request.seed = 8
    assert pickle.loads(pickle.dumps(request)) == request
    assert type(request).model_validate_json(request.model_dump_json()) == request


def test_failure_event_tells_what_the_error_tells() -> None:
    failure = Failure.of(RequestError("width", 100, "384 to 2048", nearest=384))
    assert (failure.code, failure.exit_code, failure.http_status) == ("bad_request", 2, 400)
    assert failure.values["nearest"] == 384
    assert pickle.loads(pickle.dumps(failure)) == failure


def test_every_field_has_a_help_line_and_shows_what_it_takes() -> None:
    for name, field in TextToImage.model_fields.items():
        assert field.description, name
        assert TextToImage.allowed(name), name


def test_sizes_are_worded_for_one_size_and_for_many() -> None:
    assert str(ImageSizes(128, 128, 128)) == "128 only"
    assert str(ImageSizes(384, 2048, 1024)) == "384 to 2048 in steps of 16"


@pytest.mark.parametrize("name", ["seed", "steps", "width", "cfg", "lora", "model"])
def test_values_that_cannot_even_be_written_are_refused(name: str) -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (10**5_000, -(10**5_000), deep):
        with pytest.raises(RequestError, match=f"^{name}: this (int|list) is not possible; allowed: "):
            TextToImage.parse(**{"prompt": "x", name: value}).resolved("mini")
