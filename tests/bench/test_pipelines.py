"""Ours beside the plain pipelines: operations as torch counts them, the same images, and the command itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import ImageChops, ImageStat
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mini.notes
from bench import pipelines
from bench.few_layers import FewLayers
from bench.flops import counted
from bench.pipelines import Asked, Contestant
from mini.models import MiniVAEDecoder

PROMPTS = pipelines.prompts()  # each new, since ours remembers what it has encoded
PROMPT = next(PROMPTS)
HISTORY = Path(pipelines.__file__).parent / "history.jsonl"


def contestants(weights: pipelines.Weights) -> list[Contestant]:
    built = pipelines.for_counting(weights)
    return [pipelines.ours(built), *pipelines.others(built, weights, built.dtype_name)]


@pytest.fixture(scope="module")
def small() -> list[Contestant]:
    """Ours, DiffSynth's call and diffusers' pipelines with the miniature."""
    return contestants(pipelines.miniature())


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> list[Contestant]:
    """The same at the real width, with three layers."""
    return contestants(pipelines.wide(tmp_path_factory.mktemp("few layers"), FewLayers(3, 3)))


def shares(running: list[Contestant], asked: Asked, stage: str = "total") -> list[float]:
    """Return our operations by those of each of the others, for a prompt that is new to all."""
    this = dataclasses.replace(asked, prompt=next(PROMPTS))
    ours, *theirs = (pipelines.operations(each, this) for each in running)
    for each, found in zip(running[1:], theirs, strict=True):
        print(f"{asked.title}: ours {dict(ours)}, {each.name} {dict(found)}")
    return [ours[stage] / found[stage] for found in theirs]


# --- operations


# What a mode of the real width may take of each of the others' operations, with three layers and four steps.
WIDE = [
    (Asked(256, 4), 0.88),
    (Asked(256, 4, cfg=4.0), 0.73),  # a second prompt of 512 tokens is not encoded, and refined latents are shared
    (Asked(256, 4, mode="controlnet"), 0.93),
    (Asked(256, 4, mode="upscale"), 0.89),
]


@pytest.mark.parametrize(("asked", "most"), WIDE, ids=lambda value: getattr(value, "title", ""))
def test_an_image_takes_fewer_operations_at_the_real_width(wide: list[Contestant], asked: Asked, most: float) -> None:
    assert max(shares(wide, asked)) <= most


MODES = [
    Asked(128, 1),
    Asked(128, 1, cfg=4.0),
    Asked(128, 1, mode="controlnet"),
    Asked(128, 1, mode="upscale"),
]


@pytest.mark.parametrize("asked", MODES, ids=lambda asked: asked.title)
def test_no_mode_takes_more_operations(small: list[Contestant], wide: list[Contestant], asked: Asked) -> None:
    for running in (small, wide):
        assert max(shares(running, asked)) <= 1
        # Of a step alone, since there are more of them than here.
        assert max(shares(running, asked, "denoising")) <= 1


@pytest.mark.parametrize("asked", MODES, ids=lambda asked: asked.title)
def test_a_second_seed_takes_steps_and_decoding_alone(small: list[Contestant], asked: Asked) -> None:
    new = dataclasses.replace(asked, prompt=next(PROMPTS))
    first, second = (pipelines.operations(each, new) for each in (small[0], small[0].second_seed()))
    assert first["encoding"] > 0
    assert "encoding" not in second
    assert second["denoising"] < first["denoising"]  # the prompt is refined already
    assert second["decoding"] == first["decoding"]


def test_the_stages_hold_all_operations(small: list[Contestant]) -> None:
    for each in small:
        found = pipelines.operations(each, Asked(128, 1, prompt=next(PROMPTS)))
        assert set(found) == {*pipelines.STAGES, "total"}
        assert sum(found[stage] for stage in pipelines.STAGES) == pytest.approx(found["total"], rel=1e-4)  # a preview


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_count_is_torchs_own(mode: type[torch.no_grad]) -> None:
    decoder, states = MiniVAEDecoder(), torch.zeros(1, 4, 32, 16)

    def work() -> None:
        decoder(torch.zeros(1, 16, 8, 8)) @ torch.zeros(64, 10)
        torch.nn.functional.scaled_dot_product_attention(states, states, states)

    # With the kernel that multiplies matrices, since torch's counter knows no other of a CPU.
    with mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as theirs:
        work()
    with mode(), counted() as ours:
        work()
    assert ours.flops == theirs.get_total_flops() > 0


# --- the same images


def test_all_draw_the_same_image() -> None:
    """In fp32, where little is rounded: so it is the same weights, noise, steps and guidance that are compared."""
    weights = pipelines.miniature()
    engine, built = pipelines.engine_with(weights, "cpu")
    running = [pipelines.ours_through(engine, built), *pipelines.others(built, weights, built.dtype_name)]
    for asked in (Asked(128, 4), Asked(128, 3, model="base", cfg=4.0)):
        ours, *theirs = (each.draw(dataclasses.replace(asked, prompt=PROMPT)) for each in running)
        assert max(ImageStat.Stat(ours).stddev) > 10
        for image in theirs:
            difference = ImageStat.Stat(ImageChops.difference(ours, image))
            assert max(high for _, high in difference.extrema) <= 1, asked.title


def test_the_prompts_are_drawn_as_they_are_and_all_as_long() -> None:
    encoder = pipelines.for_counting(pipelines.miniature()).prompts
    made = list(pipelines.prompts())
    assert {len(prompt.split()) for prompt in made} == {12}
    assert len({len(encoder.templated_ids(prompt)) for prompt in made}) == 1
    assert all(mini.notes.completed(prompt, seed, "mini") == (prompt, []) for seed in (7, 8) for prompt in made)
    for prompt in made:
        text, notes = mini.notes.in_known_words(prompt, "mini")
        assert text == prompt
        assert all(note.code == "own_colours" for note in notes)


# --- the command


@pytest.mark.slow
def test_a_run_is_a_line_of_the_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Fewer cases than a real run has; the pipelines that draw them are the real ones.
    monkeypatch.setattr(pipelines, "MINIATURE_CASES", (Asked(128, 1),))
    monkeypatch.setattr(pipelines, "every_mode", lambda side, base: [Asked(side, 1, mode="upscale")])
    history = tmp_path / "history.jsonl"
    arguments = ["--weights", "miniature", "--device", "cpu", "--runs", "1", "--history", str(history)]
    pipelines.main([*arguments, "--longest", "1000"])
    pipelines.main([*arguments, "--longest", "0"])
    text = capsys.readouterr().out
    everybody, alone = map(json.loads, history.read_text(encoding="utf-8").splitlines())
    (weights,) = everybody["weights"]
    assert list(weights["tflop"]) == ["turbo, 128 x 128, 1 steps", "refinement of an enlargement, 128 x 128, 1 steps"]
    (case,) = weights["cases"]
    plain = [f"{name}, {dtype}" for dtype in ("float32", "bfloat16") for name in ("DiffSynth", "diffusers")]
    assert [row["pipeline"] for row in case["rows"]] == ["ours, float32", "ours, second seed, float32", *plain]
    for row in case["rows"]:
        assert row["seconds"] == pytest.approx(sum(row["stages"].values()), abs=0.01)
        assert f"| {row['pipeline']} | {row['seconds']:.3g} " in text
    (case,) = alone["weights"][0]["cases"]
    assert len(case["rows"]) == 2
    assert set(case["left_out"]) == {"float32", "bfloat16"}
    assert "left out" in text


def test_the_history_is_whole() -> None:
    for line in HISTORY.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        assert {"date", "commit", "processor", "threads", "versions", "gflops", "runs", "weights"} <= set(run)
