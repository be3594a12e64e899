"""What a request will take: operations held against torch's own counter, seconds, memory, and what is hopeless."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

import core.request
from core.errors import RequestError
from core.messages import Message
from core.sizes import WeightsKind
from diffusion import device, measure, memory
from diffusion.device import Device
from diffusion.memory import GIB, memory_plan
from engine import estimate
from engine.estimate import Forecast, Speed, Work, assumed, check, peak_bytes, refining_flops, step_flops
from engine.modes import MODES

FAST = Speed(400e12, 30e12, 8e9, text=400e12, vae=400e12)


def plan_of(gigabytes: int, mode: str = "generate", kind: device.DeviceKind = "cuda") -> memory.MemoryPlan:
    return memory_plan(kind, gigabytes * GIB, None, 64 * GIB, mode)


def work(mode: str = "generate", *, side: int = 1024, height: int | None = None, **values: Any) -> Work:
    """A request's work with the real weights: eight steps of a square image, but for what is given."""
    given = {"steps": 8, **({} if mode == "generate" else {"image": "-"}), **values}
    if mode != "upscale":
        given.setdefault("prompt", "a fox")
    request = core.request.MODES[mode].parse(**given).resolved("full")
    return MODES[mode].work(request, "full", (side, height or side), plan_of(48))


# --- operations


@pytest.mark.parametrize("kind", ["mini", "full"])
def test_operations_agree_with_torchs_own_count(
    kind: WeightsKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the real weights with few layers of the real width."""
    from bench import pipelines
    from bench.few_layers import FewLayers

    weights = pipelines.miniature()
    if kind == "full":
        weights = pipelines.wide(tmp_path, FewLayers(transformer=3, text_encoder=2))
        few = dataclasses.replace(estimate.SHAPES[kind], layers=3, control_layers=2)
        monkeypatch.setattr(estimate, "SHAPES", {**estimate.SHAPES, kind: few})
    drawing = pipelines.ours(pipelines.for_counting(weights))
    for control in (False, True):
        asked = pipelines.Asked(128, 2, mode="controlnet" if control else "generate", prompt="a fox")
        counted = pipelines.operations(drawing, asked)
        expected = step_flops(kind, 128, 128, control=control, text=32)
        assert counted["denoising"] == pytest.approx(2 * expected + refining_flops(kind, text=32), rel=0.05)
        decode = estimate.VAE_PER_PIXEL[kind][1]
        assert counted["decoding"] == pytest.approx(128 * 128 * decode, rel=0.7 if kind == "mini" else 0.1)


def test_operations_agree_with_the_known_floors() -> None:
    assert step_flops("full", 1024, 1024) * 8 == pytest.approx(449e12, rel=0.02)
    assert step_flops("full", 2048, 2048) == pytest.approx(320e12, rel=0.02)
    plain, controlled = (step_flops("full", 1024, 1024, control=control) for control in (False, True))
    assert controlled / plain == pytest.approx(1.57, abs=0.05)


def test_each_part_of_a_request_counts() -> None:
    plain = work().flops
    assert work(steps=16).flops > 1.9 * plain
    assert work(cfg=4.0, model="base").flops > 1.9 * plain
    assert work("controlnet").flops > 1.5 * plain
    assert work("upscale").flops > plain + 4e12
    assert work(height=512).flops < 0.55 * plain


def test_an_enlargement_is_refined_in_tiles_or_not_at_all() -> None:
    native, large = work("upscale"), work("upscale", side=4096)
    assert (native.drawn_at_once, native.tiles, large.drawn_at_once) == ((1024,) * 2, 1, (1024,) * 2)
    assert large.tiles == 25  # neighbours share a quarter of a side
    assert large.flops == pytest.approx(25 * native.flops, rel=0.02)
    alone = work("upscale", denoise=0)
    assert alone.flops == 0
    assert alone.enlarging == pytest.approx(9.4e12, rel=0.5)  # Real-ESRGAN x4 of 512 x 512, and what tiles share
    # Each tile of each step fetches the weights that do not stay.
    streamed = plan_of(8)
    slow = FAST.seconds(work("upscale", side=2048), streamed)
    assert slow > 8 * 4 * memory.PART_BYTES["transformer"] / FAST.fetched


# --- seconds


def test_seconds_follow_the_device() -> None:
    slow, fast = (
        on.seconds(work(), plan_of(48)) for on in (assumed("cpu", cores=2), assumed("cuda", capability=(9, 0)))
    )
    assert slow == pytest.approx(4600, rel=0.05)  # 449 TFLOP and the rest at 100 GFLOP/s
    assert fast == pytest.approx(1.15, rel=0.05)
    assert assumed("cuda", capability=(8, 7)) == assumed("cuda", capability=(8, 6))
    assert assumed("cuda", capability=(6, 1)).products > 0


def test_fetching_weights_in_each_step_takes_time() -> None:
    streamed, resident = plan_of(8), plan_of(24)
    took = [FAST.seconds(work(side=512), plan) for plan in (streamed, resident)]
    fetched = 8 * memory.PART_BYTES["transformer"] + memory.PART_BYTES["text_encoder"]
    assert took[0] - took[1] == pytest.approx(fetched / FAST.fetched, rel=0.01)


def test_a_finished_run_replaces_the_assumption() -> None:
    on = Device("cpu", "a CPU", 64 * GIB, 60 * GIB, "float32", Message("device", "a CPU"))
    forecast, plan, drawing = Forecast(), plan_of(64, kind="cpu"), work(side=512)
    before = forecast.estimate(drawing, on, plan)
    forecast.learn(drawing, {"loading": 99.0, "encoding": 1.0, "denoising": 30.0, "decoding": 1.0})
    after = forecast.estimate(drawing, on, plan)
    assert (before.source, after.source) == ("assumed", "measured")
    assert after.seconds == pytest.approx(drawing.text_flops / assumed("cpu", cores=os.cpu_count() or 1).text + 30 + 1)
    forecast.learn(drawing, {"total": 1.0})  # a run that drew nothing teaches nothing
    assert forecast.estimate(drawing, on, plan) == after


def test_an_enlargement_rests_on_what_its_own_network_took() -> None:
    on = Device("cpu", "a CPU", 64 * GIB, 60 * GIB, "float32", Message("device", "a CPU"))
    forecast, plan = Forecast(), plan_of(64, kind="cpu")
    alone, other = work("upscale", denoise=0), work("upscale", denoise=0, upscaler="fast")
    forecast.learn(alone, {"upscaling": 7.0})
    assert forecast.estimate(alone, on, plan).seconds == pytest.approx(7.0)
    sources = [forecast.estimate(asked, on, plan).source for asked in (alone, other, work("upscale"))]
    assert sources == ["measured", "assumed", "assumed"]


@pytest.mark.parametrize(("taken", "text"), [(0.2, "1 s"), (45, "45 s"), (600, "10 minutes"), (9000, "2.5 hours")])
def test_durations_are_written_as_people_write_them(taken: float, text: str) -> None:
    assert str(estimate.duration_text(taken)) == text


# --- memory, and what is hopeless


def test_memory_grows_with_the_image_and_shrinks_with_the_plan() -> None:
    sizes = [peak_bytes(work(side=side), plan_of(48), "bfloat16") for side in (512, 1024, 2048)]
    assert sizes == sorted(sizes)
    assert sizes[0] > plan_of(48).resident_bytes
    assert peak_bytes(work("controlnet", side=2048), plan_of(48, "controlnet"), "bfloat16") - sizes[2] > 3e9
    assert peak_bytes(work(), plan_of(8), "bfloat16") < 8 * GIB


def test_usual_requests_are_let_through_on_every_machine_that_has_a_plan() -> None:
    for gigabytes in (6, 8, 12, 16, 24, 32, 48, 80, 141):
        for mode in ("generate", "controlnet"):
            plan = plan_of(gigabytes, mode)
            check(work(mode, steps=9), plan, "bfloat16", FAST)
            assert peak_bytes(work(mode, steps=9), plan, "bfloat16") <= gigabytes * GIB
    for gigabytes in (8, 16, 24, 64):
        plan = memory_plan("cpu", gigabytes * GIB, None, gigabytes * GIB, "generate")
        check(work(), plan, "float32", assumed("cpu", cores=2))


def test_what_cannot_fit_is_refused_with_the_nearest_that_does() -> None:
    plan = plan_of(3, "controlnet")
    with pytest.raises(RequestError) as raised:
        check(work("controlnet", steps=9, side=2048, height=1536), plan, "float32", FAST)
    values = raised.value.values
    assert values["field"] == "image"
    width, height = map(int, values["nearest"].split(" x "))
    assert width / height == pytest.approx(2048 / 1536, rel=0.05)
    assert width % 16 == height % 16 == 0
    check(work("controlnet", steps=9, side=width, height=height), plan, "float32", FAST)
    with pytest.raises(RequestError):
        check(work("controlnet", steps=9, side=width + 64, height=height + 64), plan, "float32", FAST)


def test_what_would_take_days_is_refused_with_the_steps_that_do_not() -> None:
    plan = memory_plan("cpu", 64 * GIB, None, 64 * GIB, "generate")
    two_cores = assumed("cpu", cores=2)
    with pytest.raises(RequestError) as raised:
        check(work(steps=100, cfg=4.0, model="base", side=2048), plan, "float32", two_cores)
    values = raised.value.values
    assert values["field"] == "steps"
    assert "hours" in str(values["allowed"])
    steps = values["nearest"]
    possible, hopeless = (work(steps=taken, cfg=4.0, model="base", side=2048) for taken in (steps, steps + 1))
    check(possible, plan, "float32", two_cores)
    assert two_cores.seconds(possible, plan) <= estimate.HOPELESS_SECONDS < two_cores.seconds(hopeless, plan)


def test_the_miniature_is_never_hopeless() -> None:
    plan = memory_plan("cpu", GIB, GIB, GIB, "generate", "mini")
    drawing, slow = Work("mini", 100, 128, 128, cfg=4.0), assumed("cpu", cores=1)
    check(drawing, plan, "float32", slow)
    assert slow.seconds(drawing, plan) < 60


def test_an_enlargement_that_would_take_days_is_refused_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    from core.events import Failure
    from core.request import Upscale
    from engine import Engine, Settings
    from hub import inventory

    Image.new("RGB", (2048, 2048)).save(tmp_path / "large.png")
    engine = Engine(Settings(device="cpu", memory_gb=64))
    # No real weights on a test machine; none is opened before the request is judged.
    monkeypatch.setattr(
        engine.worker, "weights", lambda *_: inventory.Chosen("full", {}, "nowhere", Message("test", "a test"))
    )
    # The figures of two AVX2 cores, whatever this machine has.
    fp32 = {"products": 152, "convolution": 90, "attention": 120, "text": 19}
    figures = measure.Speeds(**{work: measure.Pair(rate, rate / 7) for work, rate in fp32.items()})
    monkeypatch.setattr(measure, "speeds", lambda: figures)
    *_, last = engine.run(Upscale.parse(image=str(tmp_path / "large.png"), steps=50))
    assert isinstance(last, Failure)
    assert last.code == "bad_request"
    assert last.values["field"] == "steps"
    assert "4096 x 4096" in last.text
    assert last.values["nearest"] >= 1
