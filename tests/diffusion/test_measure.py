"""The micro-benchmark of a processor: what follows from its figures, and when it is measured at all."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from core.errors import RequestError
from diffusion import measure, memory
from diffusion.device import Accelerator, choose_device, decide
from diffusion.measure import Dtype, Pair, Speeds
from diffusion.memory import GIB
from tests.helpers.workers import worker_of

ROOT = Path(__file__).parent.parent.parent
CPU = Accelerator("cpu", "x86_64 CPU, 2 cores", 32 * GIB, 20 * GIB)
# As measured on two cores each, in GFLOP/s.
AVX2 = Speeds(products=Pair(152, 22), convolution=Pair(90, 0.3), attention=Pair(120, 20), text=Pair(19, 19))
AMX = Speeds(products=Pair(280, 950), convolution=Pair(290, 630), attention=Pair(200, 630), text=Pair(60, 400))
WITHOUT_CONVOLUTIONS = Speeds(
    products=Pair(100, 300), convolution=Pair(200, 190), attention=Pair(100, 200), text=Pair(50, 55)
)
HARDLY = Speeds(products=Pair(100, 115), convolution=Pair(100, 115), attention=Pair(100, 115), text=Pair(20, 40))


@pytest.mark.parametrize(
    ("speeds", "dtype", "text", "vae"),
    [
        (AVX2, "float32", "float32", "float32"),
        (AMX, "bfloat16", "bfloat16", "bfloat16"),
        (WITHOUT_CONVOLUTIONS, "bfloat16", "float32", "float32"),
        (HARDLY, "float32", "bfloat16", "float32"),
    ],
)
def test_each_part_computes_in_what_is_clearly_faster_for_it(
    speeds: Speeds, dtype: Dtype, text: Dtype, vae: Dtype
) -> None:
    chosen = decide("cpu", [CPU], speeds)
    assert (chosen.dtype, chosen.text_dtype, chosen.vae_dtype) == (dtype, text, vae)
    assert chosen.rates == {
        "transformer": pytest.approx(getattr(speeds.step, dtype) * 1e9),
        "text_encoder": getattr(speeds.text, text) * 1e9,
        "vae": getattr(speeds.convolution, vae) * 1e9,
    }
    plan = memory.plan_for(chosen, "generate", "full", memory_gb=30)
    assert (plan.text_dtype, plan.vae_dtype, plan.parts["vae"].held) == (text, vae, vae)


@pytest.mark.parametrize(("asked", "dtype"), [("bf16", "bfloat16"), ("fp32", "float32")])
@pytest.mark.parametrize("speeds", [AVX2, AMX])
def test_a_dtype_that_is_asked_for_is_used_for_every_part(asked: str, dtype: Dtype, speeds: Speeds) -> None:
    chosen = decide("cpu", [CPU], speeds, dtype)
    assert (chosen.dtype, chosen.text_dtype, chosen.vae_dtype) == (dtype, dtype, dtype)
    assert f"{asked}, as asked" in str(chosen.reason)
    card = Accelerator("cuda", "a card", 16 * GIB, None, (8, 9))
    assert decide("auto", [card, CPU], None, dtype).dtype == dtype


def test_a_dtype_can_be_set_in_the_environment_and_the_miniature_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("Z_IMAGE_DTYPE", "bf16")
    assert choose_device("cpu", "full").dtype == "bfloat16"
    assert choose_device("cpu", "full", "fp32").dtype == "float32"
    assert choose_device("cpu", "mini").dtype == "float32"
    monkeypatch.setenv("Z_IMAGE_DTYPE", "fp16")
    with pytest.raises(RequestError, match=r"dtype.*fp16.*auto, bf16"):
        choose_device("cpu", "full")


def test_the_reason_gives_the_figures() -> None:
    assert "only 0.15 times" in str(decide("cpu", [CPU], AVX2).reason)
    reason = str(decide("cpu", [CPU], AMX).reason)
    assert "bf16, because a step in it is 3.3 times as fast" in reason
    assert "products 280 GFLOP/s in fp32, 950 in bf16" in reason
    reason = str(decide("cpu", [CPU], WITHOUT_CONVOLUTIONS).reason)
    assert reason.endswith("; the text encoder in fp32; the VAE in fp32")


def test_an_estimate_for_the_real_weights_comes_from_the_figures() -> None:
    from engine.estimate import CPU_SHARE, Forecast, Work

    work, on = Work("full", 8, 512, 512), decide("cpu", [CPU], HARDLY)
    speed = Forecast().speed(work, on)
    assert (speed.text, speed.vae) == (CPU_SHARE * 40e9, CPU_SHARE * 100e9)
    assert speed.products == pytest.approx(CPU_SHARE * 100e9)
    plan = memory.plan_for(on, "generate", "full", memory_gb=30)
    parts = work.text_flops / speed.text + work.step_flops / speed.products + work.vae_flops / speed.vae
    assert speed.seconds(work, plan) == pytest.approx(parts + work.fetched(plan) / speed.fetched)


def test_the_figures_are_measured_once(tmp_path: Path) -> None:
    file = tmp_path / "below" / "processor.json"
    first = measure.speeds(file)
    assert all(0 < rate < 1e6 for pair in vars(first).values() for rate in vars(pair).values())
    stored = file.read_bytes()
    assert measure.speeds(file) == first
    assert file.read_bytes() == stored


def test_another_processor_is_measured_on_its_own(tmp_path: Path) -> None:
    file = tmp_path / "processor.json"
    others = {f"processor {number}": dataclasses.asdict(AVX2) for number in range(40)}
    file.write_text(json.dumps(others))
    assert measure.speeds(file) != AVX2
    kept = json.loads(file.read_text())
    assert len(kept) == measure.KEPT
    assert list(kept)[-2] == "processor 39"


@pytest.mark.parametrize(
    "damage",
    [
        *("", "[]", "{", "[" * 100_000, '{"x": 1}', "\0", '{"x": {"products": {"float32": "fast"}}}', '{"x": null}'),
        '{"KEY": {"products": {"float32": -1, "bfloat16": NaN}}}',
    ],
)
def test_a_damaged_file_is_measured_again(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "processor.json"
    file.write_text(damage.replace("KEY", measure.key()))
    assert measure.speeds(file) == measure.speeds(file)
    assert json.loads(file.read_text()).keys() == {measure.key()}


def test_where_the_file_cannot_be_written_a_process_measures_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    first = measure.speeds(tmp_path / "file" / "processor.json")
    assert first.step.ratio > 0
    assert measure.speeds(tmp_path / "file" / "processor.json") is first


def test_a_processor_without_bf16_computes_in_fp32() -> None:
    without = Speeds(products=Pair(100, 0), convolution=Pair(100, 0), attention=Pair(100, 0), text=Pair(20, 0))
    chosen = decide("cpu", [CPU], without)
    assert (chosen.dtype, chosen.text_dtype, chosen.vae_dtype) == ("float32", "float32", "float32")


def test_what_a_processor_cannot_do_runs_at_0() -> None:
    def impossible(size: int, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
        return lambda: torch.ones(2, 3) @ torch.ones(2, 3), 1.0

    assert measure._rate(impossible, (1,), torch.bfloat16) == 0


def test_threads_that_begin_meanwhile_keep_all_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def begin_another(work: measure.Work, sizes: tuple[int, ...], dtype: torch.dtype) -> float:
        another = threading.Thread(target=lambda: begun.append(torch.get_num_threads()))
        another.start()
        another.join()
        return 1.0

    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        monkeypatch.setattr(measure, "_rate", begin_another)
        measure.measure()
        assert torch.get_num_threads() == 3
        assert begun[-1] == 3
    finally:
        torch.set_num_threads(usual)


@pytest.mark.parametrize(
    ("system", "environ", "folder"),
    [
        ("linux", {"HOME": "/home/ann"}, "/home/ann/.cache"),
        ("linux", {"HOME": "/home/ann", "XDG_CACHE_HOME": "/fast"}, "/fast"),
        ("darwin", {"HOME": "/Users/ann"}, "/Users/ann/Library/Caches"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local"),
    ],
)
def test_figures_lie_in_the_folder_for_caches(system: str, environ: dict[str, str], folder: str) -> None:
    assert measure.cache_file(environ, system) == Path(folder) / "z-image-studio" / "processor.json"


def test_a_processor_is_identified_by_name_and_instructions(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    core = "model name\t: Some Xeon\nflags\t\t: fpu avx2 amx_bf16 sse\n"
    cpuinfo.write_text(f"processor\t: 0\n{core}\nprocessor\t: 1\n{core}")
    assert measure.processor(cpuinfo) == "Some Xeon avx2 amx_bf16"
    cpuinfo.write_text("CPU implementer\t: 0x41\nCPU part\t: 0xd40\nFeatures\t: asimd bf16 i8mm\n")
    assert measure.processor(cpuinfo) == "0x41 0xd40 asimd bf16 i8mm"
    assert measure.processor(tmp_path / "nothing")


def test_the_miniature_is_drawn_in_fp32_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    from core.request import TextToImage
    from engine import Engine, Settings

    def refuse(*_: object) -> Speeds:
        raise AssertionError("the processor's figures were asked for")

    monkeypatch.setattr(measure, "speeds", refuse)  # whether they have been measured before or not
    engine = Engine(Settings(weights="mini", device="cpu"))
    engine.draw(TextToImage.parse(prompt="a fox", steps=1, seed=1))
    device = worker_of(engine).device
    assert device is not None
    assert device.dtype == "float32"
    assert "a seed means one picture" in str(device.reason)


@pytest.mark.slow
def test_doctor_shows_the_figures_and_measures_once(tmp_path: Path) -> None:
    command = [sys.executable, "cli.py", "doctor", "--json", "--device", "cpu"]
    environ = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    first, second = (
        json.loads(subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True).stdout)
        for _ in range(2)
    )
    assert first["processor"].keys() == {"products", "convolution", "attention", "text"}
    assert all("GFLOP/s in fp32" in pair for pair in first["processor"].values())
    assert first["processor"] == second["processor"]
    assert (tmp_path / "z-image-studio" / "processor.json").is_file()
    assert first["processor"]["products"] in first["device for the real weights"]
