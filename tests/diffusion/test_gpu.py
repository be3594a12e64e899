"""The benchmark for CUDA cards at reduced size on the CPU; and, with `-m gpu`, every mode on real weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from PIL import Image

    from core.request import DrawRequest
    from engine import Engine

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_the_benchmark_runs_at_reduced_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import gpu
    from engine import mode_upscale

    def enlarge(image: Image.Image, choice: str, *rest: Any) -> Any:
        """Enlarge with the small network, as everything else is the miniature's here; the usual one takes seconds."""
        assert choice == "best"
        return real(image, "fast", *rest)

    real: Callable[..., Any] = mode_upscale.enlarge
    monkeypatch.setattr(mode_upscale, "enlarge", enlarge)
    out = tmp_path / "gpu"
    gpu.main(
        ["--device", "cpu", "--weights", "mini", "--runs", "1", "--skip-compile", "--out", str(out)],
    )
    facts = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == facts
    done_cases = [case["case"] for case in facts["cases"]]
    assert done_cases[:2] == ["Turbo 512", "Turbo 1024"]
    for mode in ("Turbo 2048", "Base", "ControlNet", "Upscale", "LoRA"):
        assert any(mode in case for case in done_cases), mode
    for case in (*facts["cases"], *facts["plans"]):
        assert "error" not in case, case
        assert case["finite"]
        assert case["seconds"] > 0
    assert [other["pipeline"] for other in facts["others"]] == [
        "ours",
        "DiffSynth's own call",
        "diffusers, latents only",
    ]
    text = out.with_suffix(".md").read_text(encoding="utf-8")
    assert all(case["case"] in text for case in facts["cases"])


def test_the_benchmark_starts_as_a_script() -> None:
    command = [sys.executable, "bench/gpu.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "--skip-compile" in done.stdout


# --- on a card, with the real weights: pytest -m gpu

SIDE = 384


@pytest.fixture(scope="module")
def real() -> Engine:
    """An engine with the real weights on a CUDA card."""
    from engine import Engine, Settings

    return Engine(Settings(weights="full", device="cuda"))


@pytest.fixture
def picture(tmp_path: Path) -> str:
    """An image to take structure from."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(image).ellipse((80, 80, 300, 300), fill="black")
    image.save(tmp_path / "circle.png")
    return str(tmp_path / "circle.png")


def requests(picture: str) -> list[DrawRequest]:
    """Return a small request of every mode that draws."""
    from core.request import MODES

    found: list[DrawRequest] = []
    for mode in MODES.values():
        for model in mode.needs:
            values = {"prompt": "a lighthouse in a storm", "seed": 7, "width": SIDE, "height": SIDE, "model": model}
            values |= {"image": picture, "preprocessor": "canny"}
            found.append(mode.parse(**{name: value for name, value in values.items() if name in mode.model_fields}))
    return found


def test_every_mode_is_asked_for(picture: str) -> None:
    """Not on a card: that the requests below are ones, whatever modes are added."""
    from core.request import MODES

    assert {request.mode for request in requests(picture)} == set(MODES)


@pytest.mark.gpu
def test_every_mode_draws_with_real_weights(real: Engine, picture: str) -> None:
    for request in requests(picture):
        result = real.draw(request)
        assert result.weights == "full"
        assert min(result.size) >= SIDE
        assert not [note for note in result.notes if note.code in ("safe_mode", "less_memory")]
        assert real.draw(result.request).png == result.png  # the same seed, the same image


@pytest.mark.gpu
def test_smaller_cards_plans_draw_the_same_image(picture: str) -> None:
    """Streamed and staged weights are the same weights: at most rounding may differ."""
    import io

    from PIL import Image, ImageChops, ImageStat

    from engine import Engine, Settings

    request = requests(picture)[0]
    pictures = []
    for gigabytes in (None, 17, 8):
        engine = Engine(Settings(weights="full", device="cuda", memory_gb=gigabytes))
        pictures.append(Image.open(io.BytesIO(engine.draw(request).png)))
    for other in pictures[1:]:
        assert max(ImageStat.Stat(ImageChops.difference(pictures[0], other)).mean) < 2


@pytest.mark.gpu
def test_the_estimate_of_memory_is_above_what_is_taken(real: Engine, picture: str) -> None:
    import torch

    from engine.estimate import peak_bytes
    from engine.modes import MODES
    from tests.helpers.workers import worker_of

    for request in requests(picture):
        torch.cuda.reset_peak_memory_stats()
        result = real.draw(request)
        on, plan = worker_of(real).machine(request.mode, "full")
        work = MODES[request.mode].work(result.request, "full", result.size, plan)
        assert torch.cuda.max_memory_allocated() <= peak_bytes(work, plan, on.dtype)
    assert os.environ["DIFFSYNTH_ATTENTION_IMPLEMENTATION"] == "torch"
