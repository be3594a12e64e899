"""What the real weights cost on a CUDA card: every mode, every memory plan, and two other pipelines, in one run.

    .venv/bin/python bench/gpu.py

Needs no weights and no network: files of full size are written without data (they take no room on the disk), loaded
through the program's own path, and filled with random numbers on the card, since zeros would be multiplied faster.
Plans for smaller cards are measured by capping this process's memory and planning for it; parts that such a plan
fetches from the disk stay zero. Writes docs/gpu.json and docs/gpu.md, and prints the JSON last.

`--weights mini --device cpu` runs the same code on the miniature, to see that it works.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core import environment
from core.request import UPSCALE_DENOISE
from core.whole_file import write_together
from diffusion import device
from diffusion.memory import GIB, PART_BYTES, VRAM_MARGIN_GIB, MemoryPlan, memory_plan, plan_for

environment.prepare_environment(os.environ)

from diffusion import host_memory
from engine import estimate, mode_upscale
from engine.modes import MODES
from hub import inventory

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from core.request import Model
    from core.sizes import WeightsKind
    from diffusion.pipeline import Picture, Pipeline, Progress
    from lora.file import LoraFile

PROMPT = "a fox on a black background"
CARDS = (8, 12, 16, 24, 48, 80)  # GB of the cards that plans are measured for, below the real one's


@dataclass(frozen=True)
class Case:
    """One request; `side` is its result's width and height."""

    name: str
    mode: str = "generate"
    model: Model = "turbo"
    side: int = 1024
    steps: int = 8
    cfg: float = 1.0
    lora: bool = False
    compiled: bool = False

    def work(self, kind: WeightsKind, plan: MemoryPlan) -> estimate.Work:
        """What it computes."""
        given: dict[str, Any] = {"steps": self.steps}
        given |= {"prompt": PROMPT} if self.mode != "upscale" else {"denoise": UPSCALE_DENOISE["full"]}
        given |= {"image": "-"} if self.mode != "generate" else {"model": self.model, "cfg": self.cfg}
        request = MODES[self.mode].request.parse(**given).resolved(kind)
        return MODES[self.mode].work(request, kind, (self.side, self.side), plan)


CASES = (
    Case("Turbo 512", side=512),
    Case("Turbo 1024"),
    Case("Turbo 2048", side=2048),
    Case("Turbo 1024, LoRA", lora=True),
    Case("ControlNet 1024", "controlnet", steps=9),
    Case("ControlNet 1024, LoRA", "controlnet", steps=9, lora=True),
    Case("Upscale 512 to 1024", "upscale", steps=5),
    Case("Upscale 1024 to 2048", "upscale", side=2048, steps=5),
    Case("Base 1024, guided", model="base", steps=25, cfg=4.0),
    Case("Turbo 1024, compiled", compiled=True),
    Case("Turbo 1024, compiled, LoRA", compiled=True, lora=True),
)


def shrunk(case: Case) -> Case:
    """Return a case small enough for the miniature, and with few steps; Upscale's larger one still needs tiles."""
    side = 160 if case.mode == "upscale" and case.side > 1024 else 128
    return dataclasses.replace(case, side=side, steps=2)


class Bench:
    """One device and one kind of weights, with the files that they are read from."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        from bench import memory

        self.memory = memory
        self.kind: WeightsKind = args.weights
        self.runs: int = args.runs
        self.folder = folder
        self.on = device.choose_device(args.device, self.kind)
        # By the objects themselves: a dropped model's id may be the next one's.
        self.filled: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self.compiled: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self.chosen: dict[str, dict[str, inventory.Chosen]] = {}
        for mode in ("generate", "controlnet"):
            if self.kind == "full":
                self.chosen[mode] = memory.write(folder, mode)
            else:
                modes = {"turbo": mode, "base": "generate"}
                self.chosen[mode] = {model: inventory.choose("mini", modes[model], model) for model in modes}
        self.chosen["upscale"] = self.chosen["generate"]  # Real-ESRGAN comes with a package

    def build(self, plan: MemoryPlan) -> Pipeline:
        """Return an empty pipeline under a plan."""
        import torch

        from diffusion.pipeline import Pipeline

        return Pipeline(self.on.kind, getattr(torch, self.on.dtype), plan)

    def load(self, built: Pipeline, case: Case) -> None:
        """Load what a case needs, and fill what was newly read with random numbers."""
        for _ in built.load(self.chosen[case.mode][case.model], case.model):
            pass
        for model in self._models(built):
            if self.kind == "full" and model not in self.filled:
                fill(model, self.on.kind)
                self.filled.add(model)
        if self.kind == "full":
            for part, size in self.memory.held(built).items():
                if size != PART_BYTES[{"turbo": "transformer", "base": "transformer"}.get(part, part)]:
                    raise ValueError(f"{part} was not loaded whole: {size:,} bytes in bf16")

    @staticmethod
    def _models(built: Pipeline) -> list[torch.nn.Module]:
        return [*built.pipe.children(), *built.transformers.values()]

    def draw(self, built: Pipeline, case: Case) -> Picture:
        """Draw a case's image with what is loaded."""
        if case.mode == "upscale":
            drawing = self.enlarging(built, case)
        else:
            drawing = built.text_to_image(
                prompt=PROMPT,
                negative_prompt="",
                steps=case.steps,
                cfg=case.cfg,
                width=case.side,
                height=case.side,
                seed=7,
                control=(gradient(case.side), 0.8) if case.mode == "controlnet" else None,
            )
        with built.lora(built.loras.get(self.lora()), 0.8) if case.lora else contextlib.nullcontext():
            while True:
                try:
                    next(drawing)
                except StopIteration as done:
                    picture: Picture = done.value
                    return picture

    def enlarging(self, built: Pipeline, case: Case) -> Progress:
        """Carry out both halves of an enlargement; no look is taken at the result, which is noise here."""
        mode_upscale._enlarged.clear()  # each run is to do it
        enlarged, _ = yield from mode_upscale.enlarge(gradient(case.side // 2), "best", self.on.kind, built.plan)
        return (
            yield from built.image_to_image(
                image=enlarged,
                prompt=PROMPT,
                steps=case.steps,
                denoise=0.33,
                seed=7,
                side=mode_upscale.refinement_side(enlarged.size, self.kind, built.plan),
            )
        )

    def lora(self) -> LoraFile:
        """Return a random LoRA of the transformer's size, written once."""
        from lora.file import read
        from tests.helpers import loras

        path = self.folder / "random.safetensors"
        if not path.exists():
            loras.write(path, loras.peft(loras.random_pairs(size=self.kind, gain=0.01)))
        return read(path)

    def measure(self, built: Pipeline, case: Case) -> dict[str, Any]:
        """Return the seconds of a case, loaded and warm, the memory it took, and what was expected."""
        start = time.perf_counter()
        self.load(built, case)
        loading = time.perf_counter() - start
        if case.compiled and built.pipe not in self.compiled:
            built.pipe.compile_pipeline()
            self.compiled.add(built.pipe)
        self.draw(built, case)  # warms up
        reset_peak(self.on.kind)
        taken = [timed(lambda: self.draw(built, case), self.on.kind) for _ in range(self.runs)]
        picture = self.draw(built, case)
        assert picture.health is not None  # it was drawn just now
        seconds = statistics.median(taken)
        usual = estimate.assumed(self.on.kind, capability=self.on.capability, cores=os.cpu_count() or 1)
        work = case.work(self.kind, built.plan)
        return {
            "case": case.name,
            "seconds": round(seconds, 3),
            "from": round(min(taken), 3),
            "to": round(max(taken), 3),
            "loading": round(loading, 1),
            "tflops": round((work.flops + work.enlarging) / seconds / 1e12, 2),
            "peak_gb": round(peak(self.on.kind) / 1e9, 2),
            "expected_gb": round(estimate.peak_bytes(work, built.plan, self.on.dtype) / 1e9, 2),
            "expected_seconds": round(usual.seconds(work, built.plan), 2),
            "finite": picture.health.latents_finite and picture.health.pixels_finite,
        }


def gradient(side: int) -> Image.Image:
    """Return an image from black to white, RGB, of this width and height."""
    from PIL import Image

    return Image.linear_gradient("L").resize((side, side)).convert("RGB")


def fill(model: torch.nn.Module, device_kind: str) -> None:
    """Give a model random numbers of a usual size, made on the device, wherever its weights lie."""
    import torch

    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.is_meta:
                continue
            if values.ndim == 1:
                values.fill_(0.0 if name.endswith("bias") else 1.0)  # what is left are norms
                continue
            made = torch.randn(values.shape, dtype=values.dtype, device=device_kind)
            values.copy_(made.mul_(values.shape[1:].numel() ** -0.5))


def timed(work: Callable[[], object], device_kind: str) -> float:
    """Return the wall seconds of some work, the device's part of it included."""
    synchronize(device_kind)
    start = time.perf_counter()
    work()
    synchronize(device_kind)
    return time.perf_counter() - start


def synchronize(device_kind: str) -> None:
    """Wait for the device."""
    import torch

    if device_kind != "cpu":
        getattr(torch, device_kind).synchronize()


def reset_peak(device_kind: str) -> None:
    """Forget the largest memory so far."""
    import torch

    if device_kind == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak(device_kind: str) -> int:
    """Return the largest memory that tensors took on a card; 0 where torch does not report it."""
    import torch

    return torch.cuda.max_memory_allocated() if device_kind == "cuda" else 0


def clear(device_kind: str) -> None:
    """Give back what a dropped pipeline held."""
    import torch

    gc.collect()
    if device_kind == "cuda":
        torch.cuda.empty_cache()


def attempt(facts: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `work` measured with some facts; where it fails, the failure is the result."""
    try:
        return {**facts, **work()}
    except Exception as error:
        traceback.print_exc()
        return {**facts, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def cases(bench: Bench, chosen: list[Case]) -> list[dict[str, Any]]:
    """Measure every case with everything that fits in memory."""
    plan = plan_for(bench.on, "controlnet", bench.kind)
    built = bench.build(plan)
    found = []
    for case in chosen:
        print(case.name, file=sys.stderr, flush=True)
        found.append(attempt({"case": case.name}, partial(bench.measure, built, case)))
    return found


def plans(bench: Bench, cards: list[int], case: Case) -> list[dict[str, Any]]:
    """Measure one case under the plan for each smaller card, in a process capped to its memory."""
    import torch

    def measured(plan: MemoryPlan) -> dict[str, Any]:
        return bench.measure(bench.build(plan), case)

    host_total, _ = host_memory.total_and_free()
    found = []
    for gigabytes in cards:
        clear(bench.on.kind)
        room = gigabytes * 10**9
        plan = memory_plan(
            bench.on.kind, bench.on.total_bytes, room, host_total, case.mode, bench.kind, bench.on.dtype, allowed=room
        )
        if bench.on.kind == "cuda":
            assert bench.on.total_bytes is not None  # every card reports it
            torch.cuda.set_per_process_memory_fraction(min(1.0, room / bench.on.total_bytes))
            # DiffSynth asks how full the whole card is; for this process it is full at its cap.
            limit = room / GIB - VRAM_MARGIN_GIB if plan.offload else None
            plan = dataclasses.replace(plan, vram_limit_gb=limit)
        print(f"{gigabytes} GB: {plan.reasons[0]}", file=sys.stderr, flush=True)
        facts = {
            "card_gb": gigabytes,
            "plan": [str(reason) for reason in plan.reasons],
            "resident_gb": round(plan.resident_bytes / 1e9, 1),
        }
        found.append(attempt(facts, partial(measured, plan)))
    if bench.on.kind == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
    return found


def others(bench: Bench, case: Case) -> list[dict[str, Any]]:
    """Measure ours, DiffSynth's own call and diffusers, on the same device and size, with the same weights' sizes.

    Ours and DiffSynth's take turns, with the same models. diffusers' has its own transformer, which small cards cannot
    hold beside them: it comes afterwards, and may fail alone.
    """

    def measured(contestants: Callable[[Bench, Case], dict[str, Callable[[], object]]]) -> dict[str, Any]:
        return {"rows": _in_turns(bench, contestants(bench, case))}

    rows = []
    for made in (_ours_and_diffsynth, _diffusers):
        clear(bench.on.kind)
        found = attempt({}, partial(measured, made))
        rows += found.get("rows", [{"pipeline": made.__name__.strip("_").replace("_", " "), **found}])
    ours = next((row["seconds"] for row in rows if row["pipeline"] == "ours"), None)
    return [
        {**row, "times_ours": round(row["seconds"] / ours, 2)} if ours and "seconds" in row else row for row in rows
    ]


def _in_turns(bench: Bench, contestants: dict[str, Callable[[], object]]) -> list[dict[str, Any]]:
    """Return the median seconds of each; the first run warms up."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for run in range(bench.runs + 1):
        for name, work in contestants.items():
            once = timed(work, bench.on.kind)
            if run:
                taken[name].append(once)
    return [{"pipeline": name, "seconds": round(statistics.median(times), 3)} for name, times in taken.items()]


def _ours_and_diffsynth(bench: Bench, case: Case) -> dict[str, Callable[[], object]]:
    import torch
    from diffsynth.pipelines.z_image import ZImageUnit_PromptEmbedder

    built = bench.build(plan_for(bench.on, case.mode, bench.kind))
    bench.load(built, case)
    pipe, plain_unit = built.pipe, ZImageUnit_PromptEmbedder()

    def diffsynth_call() -> None:
        """Draw with DiffSynth's pipeline as it comes, its padded prompts included."""
        ours, pipe.units[1] = pipe.units[1], plain_unit
        with torch.no_grad():
            pipe(
                prompt=PROMPT,
                seed=7,
                height=case.side,
                width=case.side,
                num_inference_steps=case.steps,
                progress_bar_cmd=iter,
            )
        pipe.units[1] = ours

    return {"ours": lambda: bench.draw(built, case), "DiffSynth's own call": diffsynth_call}


def _diffusers(bench: Bench, case: Case) -> dict[str, Callable[[], object]]:
    import torch

    import mini.config

    diffusers: Any = importlib.import_module("diffusers")  # loads its names lazily, which hides their types
    config = mini.config.TRANSFORMER_CONFIG if bench.kind == "mini" else {}
    dtype = getattr(torch, bench.on.dtype)
    with torch.device("meta"):
        transformer = diffusers.ZImageTransformer2DModel(**config).to(dtype)
    transformer = transformer.to_empty(device=bench.on.kind)
    fill(transformer, bench.on.kind)
    theirs = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    theirs.set_progress_bar_config(disable=True)
    embeds = [torch.randn(32, transformer.config.cap_feat_dim, dtype=dtype, device=bench.on.kind)]

    def diffusers_call() -> None:
        """Draw latents with diffusers: no text encoder, no decoding."""
        theirs(
            prompt_embeds=embeds,
            height=case.side,
            width=case.side,
            num_inference_steps=case.steps,
            guidance_scale=0,
            output_type="latent",
        )

    return {"diffusers, latents only": diffusers_call}


def markdown(facts: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    size = "the real models'" if facts["weights"] == "full" else "the miniature's"
    lines = [
        "# Measured on a card",
        "",
        f"`.venv/bin/python bench/gpu.py`, {facts['date']}: {facts['device']}; torch {facts['torch']}, diffsynth "
        f"{facts['diffsynth']}. Weights of {size} size; "
        f"medians of {facts['runs']} warm runs.",
        "",
        "| request | seconds | TFLOP/s | memory, GB | expected, GB | expected, s |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_row(case["case"], case) for case in facts["cases"]]
    lines += ["", f"## Smaller cards: {facts['plan_case']}", ""]
    lines += ["| card | plan | seconds | TFLOP/s | memory, GB | expected, GB | expected, s |", "|---" * 7 + "|"]
    lines += [_row(f"{plan['card_gb']} GB | {plan['plan'][0]}", plan) for plan in facts["plans"]]
    lines += ["", f"## Beside other pipelines: {facts['plan_case']}", ""]
    lines += ["| pipeline | seconds | times ours |", "|---|---|---|"]
    lines += [
        f"| {other['pipeline']} | {other.get('seconds', other.get('error'))} | {other.get('times_ours', '')} |"
        for other in facts["others"]
    ]
    return "\n".join(lines) + "\n"


def _row(title: str, facts: dict[str, Any]) -> str:
    if "error" in facts:
        return f"| {title} | {facts['error']} | | | | |"
    names = ("seconds", "tflops", "peak_gb", "expected_gb", "expected_seconds")
    return f"| {title} | {' | '.join(str(facts[name]) for name in names)} |"


def main(argv: list[str] | None = None) -> None:
    """Measure everything, write the tables and print the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--weights", choices=["full", "mini"], default="full")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu", help="without an ending")
    parser.add_argument("--skip-compile", action="store_true", help="compiling takes minutes")
    args = parser.parse_args(argv)

    import torch

    chosen = [case for case in CASES if not (case.compiled and args.skip_compile)]
    plan_case = Case("Turbo 1024")
    if args.weights == "mini":
        chosen, plan_case = [shrunk(case) for case in chosen], shrunk(plan_case)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        smaller = [card for card in CARDS if card * 10**9 < (bench.on.total_bytes or 0)]
        cards = smaller if args.weights == "full" else [1]
        facts = {
            "date": time.strftime("%Y-%m-%d"),
            "device": str(bench.on.reason),
            "torch": torch.__version__,
            "diffsynth": importlib.metadata.version("diffsynth"),
            "weights": args.weights,
            "runs": args.runs,
            "cases": cases(bench, chosen),
            "plan_case": plan_case.name,
        }
        clear(bench.on.kind)
        facts["others"] = others(bench, plan_case)
        clear(bench.on.kind)
        facts["plans"] = plans(bench, cards, plan_case)
    print(json.dumps(facts))  # first: what took an hour is not lost where it cannot be written
    text = json.dumps(facts, indent=1) + "\n"
    write_together(
        {args.out.with_suffix(".json"): text.encode(), args.out.with_suffix(".md"): markdown(facts).encode()}
    )


if __name__ == "__main__":
    main()
