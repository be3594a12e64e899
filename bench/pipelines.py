"""Ours beside DiffSynth's own call and diffusers' pipelines, on the same weights: seconds, operations and memory.

    .venv/bin/python bench/pipelines.py [--weights miniature wide] [--sides 256 512] [--runs 5]

Warm, loading excluded, encoding and decoding included; in turn, and a ratio is the median of the rounds' ratios, so
that a machine's moods reach all of them; where other work runs too, `--busy` counts this process's own time. `wide` is
the real width with few layers (`bench/few_layers.py`) and random numbers. The others run in the dtype that ours takes
on this machine and in their own default, bf16. Ours goes through the engine: its seconds hold the queue, the check of
the result and the PNG. Beside the seconds stand the operations that torch counts, which no machine's mood changes, for
every mode.

Prints tables, and adds the figures as one line to bench/history.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core import environment

environment.prepare_environment(os.environ)

import torch
from diffsynth.core.vram.initialization import skip_model_initialization
from diffsynth.core.vram.layers import AutoWrappedModule
from diffsynth.diffusion.base_pipeline import ControlNetInput
from diffsynth.models import model_loader
from diffsynth.pipelines.z_image import ZImagePipeline
from PIL import Image

import mini.config
from bench.few_layers import FewLayers
from bench.flops import counted
from bench.gpu import fill, gradient, synchronize
from bench.memory import Peak, anonymous
from core.request import UPSCALE_DENOISE, Model, TextToImage, WeightsChoice
from core.sizes import IMAGE_SIZES, WeightsKind
from diffusion import host_memory, measure
from diffusion.measure import Dtype
from diffusion.memory import memory_plan
from diffusion.pipeline import SIGMA_SHIFT, Pipeline, follow_weight_dtype
from engine import Engine, Settings
from engine.mode import Job, Prepared
from engine.worker import LocalWorker
from hub import inventory
from hub.inventory import Chosen

STAGES = ("encoding", "denoising", "decoding")
THEIR_DEFAULT: Dtype = "bfloat16"  # DiffSynth's own, and the one that the models' pages load diffusers' with
ROOMY = 10**12  # bytes: a plan that keeps everything in memory as it is computed
COLOURS = ("red", "green", "blue", "yellow", "black", "gray")
Figures = dict[str, Any]  # as they go into the history


def prompts() -> Iterator[str]:
    """Yield prompts of twelve words and as many tokens each; the miniature draws them as they are."""
    for apple, frog, ground in itertools.permutations(COLOURS, 3):
        yield f"a large {apple} apple and a small {frog} frog on {ground} background"


@dataclass(frozen=True)
class Asked:
    """One image, as every pipeline is asked for it.

    Attributes:
        side: width and height in pixels.
        steps: Euler steps, all of which are taken.
        cfg: guidance in DiffSynth's sense; 1 is none.
        mode: "upscale" is its refinement, in one tile.
    """

    side: int
    steps: int
    model: Model = "turbo"
    cfg: float = 1.0
    mode: str = "generate"
    prompt: str = ""
    seed: int = 7

    @property
    def title(self) -> str:
        """The image in words."""
        what = {"generate": self.model, "controlnet": "ControlNet", "upscale": "refinement of an enlargement"}[
            self.mode
        ]
        return f"{what}, {self.side} x {self.side}, {self.steps} steps" + (", guided" if self.cfg != 1 else "")


MINIATURE_CASES = (Asked(128, 8), Asked(128, 25, model="base", cfg=4.0))


class Meter:
    """What each stage's models take of something: seconds, or operations."""

    def __init__(self) -> None:
        self.read: Callable[[], float] = time.perf_counter
        self.taken: dict[str, float] = {}
        self._entered = 0.0

    def enter(self, *_: object) -> None:
        """Begin a stage's model; also a hook before a module's forward."""
        self._entered = self.read()

    def leave(self, stage: str, *_: object) -> None:
        """End it; also, with a stage given, a hook after a module's forward."""
        self.taken[stage] = self.taken.get(stage, 0.0) + self.read() - self._entered

    def watch(self, stage: str, *modules: torch.nn.Module) -> None:
        """Count what these modules take from now on."""
        for module in modules:
            module.register_forward_pre_hook(self.enter)
            module.register_forward_hook(partial(self.leave, stage))

    def watched(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls are counted."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter()
            result = function(*args, **kwargs)
            self.leave(stage)
            return result

        return call


@dataclass(frozen=True)
class Contestant:
    """A pipeline that draws what it is asked for, computing in a dtype."""

    name: str
    dtype: str
    draw: Callable[[Asked], Image.Image]
    meter: Meter = field(default_factory=Meter)

    @property
    def title(self) -> str:
        """The name, with the dtype."""
        return f"{self.name}, {self.dtype}"

    def second_seed(self) -> Contestant:
        """Return the same pipeline for another seed of what it has drawn just now."""
        draw = self.draw
        name = f"{self.name}, second seed"
        return dataclasses.replace(
            self, name=name, draw=lambda asked: draw(dataclasses.replace(asked, seed=asked.seed + 1))
        )


@dataclass(frozen=True)
class Weights:
    """What is drawn with.

    Attributes:
        title: for people.
        chosen: the files, by model.
        configs: keyword arguments of the classes that they are loaded as, by the pipe's attribute.
        random: whether the files hold nothing, and random numbers take their place.
    """

    title: str
    kind: WeightsKind
    chosen: Mapping[Model, Chosen]
    configs: Mapping[str, Mapping[str, Any]]
    random: bool = False


def miniature() -> Weights:
    """Return the miniature, with its ControlNet."""
    chosen: dict[Model, Chosen] = {
        "turbo": inventory.choose("mini", "controlnet", "turbo"),
        "base": inventory.choose("mini", "generate", "base"),
    }
    return Weights("the miniature", "mini", chosen, {"dit": mini.config.TRANSFORMER_CONFIG})


def wide(folder: Path, layers: FewLayers) -> Weights:
    """Return the real width with few layers, whose files are written into a folder; there is no Base."""
    title = f"the real width, {layers.transformer} layers, text encoder {layers.text_encoder}"
    return Weights(title, "full", {"turbo": layers.write(folder)}, layers.configs, random=True)


# --- ours -----------------------------------------------------------------------------------------------------------


class _Worker(LocalWorker):
    """A worker of this process that is given its weights."""

    def __init__(self, weights: Weights, device: str) -> None:
        super().__init__(Settings(weights=weights.kind, device=device, memory_gb=ROOMY / 1e9))
        self._weights = weights

    def weights(self, mode: str, model: Model, asked: WeightsChoice, checkpoint: str = "") -> Chosen:
        """Return the weights of a model, without what the ControlNet alone needs."""
        chosen = next(chosen for name, chosen in self._weights.chosen.items() if name == model)
        files = {part: files for part, files in chosen.files.items() if part != "controlnet"}
        return dataclasses.replace(chosen, files=files)


def engine_with(weights: Weights, device: str) -> tuple[Engine, Pipeline]:
    """Return an engine that has loaded everything, and its pipeline."""
    worker = _Worker(weights, device)
    for model in weights.chosen:
        request = TextToImage.parse(prompt="-", model=model).resolved(weights.kind)
        job = Job(request, worker.weights(request.mode, model, "auto"), Prepared((request.width, request.height)))
        for _ in worker.load(job):
            pass
    built = worker.pipeline
    assert built is not None  # it was loaded just now
    if weights.random:
        torch.manual_seed(0)
        for module in built.pipe.children():
            fill(module, built.pipe.device)
    return Engine(worker=worker), built


def for_counting(weights: Weights) -> Pipeline:
    """Return a pipeline with everything loaded, whose numbers are not read from the files: counting needs none."""
    dtype: Dtype = "bfloat16"  # operations depend on no dtype
    built = Pipeline("cpu", getattr(torch, dtype), memory_plan("cpu", ROOMY, None, ROOMY, "controlnet", dtype=dtype))
    with patch.object(model_loader, "load_model", _unread):
        for model in reversed(tuple(weights.chosen)):  # Turbo last, which the ControlNet is for
            for _ in built.load(weights.chosen[model], model):
                pass
    return built


def _unread(
    model_class: type[torch.nn.Module],
    path: object,
    config: Mapping[str, Any] | None = None,
    torch_dtype: torch.dtype = torch.bfloat16,
    *_: object,
    **__: object,
) -> torch.nn.Module:
    """Stand in for DiffSynth's function of these arguments: large weights get memory that nobody ever touches."""

    def memory(like: torch.Tensor) -> torch.Tensor:
        make = torch.empty if like.ndim > 1 else torch.zeros
        return make(like.shape, dtype=torch_dtype)

    with skip_model_initialization():
        module = model_class(**(config or {}))
    module.load_state_dict({name: memory(like) for name, like in module.state_dict().items()}, assign=True)
    return module.eval()


def ours(built: Pipeline) -> Contestant:
    """Return our pipeline alone, for every mode."""

    def draw(asked: Asked) -> Image.Image:
        built.pipe.dit = built.transformers[asked.model]
        if asked.mode == "upscale":
            drawing = built.image_to_image(
                image=gradient(asked.side),
                prompt=asked.prompt,
                steps=asked.steps,
                denoise=UPSCALE_DENOISE["full"],
                seed=asked.seed,
                side=asked.side,
            )
        else:
            drawing = built.text_to_image(
                prompt=asked.prompt,
                negative_prompt="",
                steps=asked.steps,
                cfg=asked.cfg,
                width=asked.side,
                height=asked.side,
                seed=asked.seed,
                control=(gradient(asked.side), 0.8) if asked.mode == "controlnet" else None,
            )
        while True:
            try:
                next(drawing)
            except StopIteration as done:
                image: Image.Image = done.value.image
                return image

    return _watching_ours(Contestant("ours", built.dtype_name, draw), built)


def ours_through(engine: Engine, built: Pipeline) -> Contestant:
    """Return the whole program, from a request to a PNG."""

    def draw(asked: Asked) -> Image.Image:
        request = TextToImage.parse(
            prompt=asked.prompt,
            model=asked.model,
            steps=asked.steps,
            cfg=asked.cfg,
            width=asked.side,
            height=asked.side,
            seed=asked.seed,
        )
        return Image.open(io.BytesIO(engine.draw(request).png))

    return _watching_ours(Contestant("ours", built.dtype_name, draw), built)


def _watching_ours(contestant: Contestant, built: Pipeline) -> Contestant:
    for name in ("caption", "control", "predict"):
        setattr(built.denoiser, name, contestant.meter.watched("denoising", getattr(built.denoiser, name)))
    return _watching(contestant, built.pipe)


def _watching(contestant: Contestant, pipe: ZImagePipeline) -> Contestant:
    contestant.meter.watch("encoding", pipe.text_encoder, pipe.vae_encoder)
    contestant.meter.watch("decoding", pipe.vae_decoder)
    pipe.model_fn = contestant.meter.watched("denoising", pipe.model_fn)
    return contestant


# --- theirs, with the same numbers ----------------------------------------------------------------------------------


def others(built: Pipeline, weights: Weights, dtype: str) -> list[Contestant]:
    """Return the plain pipelines in a dtype, with our weights: the same memory where they are in that dtype."""
    names = ("text_encoder", "vae_encoder", "vae_decoder", "controlnet")
    modules = {name: module for name in names if (module := getattr(built.pipe, name)) is not None}
    twins = {name: _twin(module, weights.configs.get(name, {}), dtype) for name, module in modules.items()}
    transformers = {
        model: _twin(transformer, weights.configs["dit"], dtype) for model, transformer in built.transformers.items()
    }
    return [
        diffsynth_call(built, twins, transformers, dtype),
        diffusers_pipelines(built, twins, transformers, weights, dtype),
    ]


Modules = Mapping[str, torch.nn.Module]


def _twin(module: torch.nn.Module, config: Mapping[str, Any], dtype: str) -> torch.nn.Module:
    """Return a module of the same class as it comes, without what ours has changed of it, with the same weights.

    Where ours computes in another dtype than the file's, DiffSynth wraps modules, whole ones too: each has a `module`.
    """
    made: Callable[..., torch.nn.Module] = type(module.module if isinstance(module, AutoWrappedModule) else module)
    weights = {re.sub(r"(^|\.)module\.", r"\1", name): values for name, values in module.state_dict().items()}
    twin: torch.nn.Module = _with_weights(partial(made, **config), weights, dtype)
    return twin


def _with_weights(make: Callable[[], torch.nn.Module], weights: Mapping[str, torch.Tensor], dtype: str) -> Any:
    with skip_model_initialization():
        module = make()
    module.load_state_dict({name: values.to(getattr(torch, dtype)) for name, values in weights.items()}, assign=True)
    device = next(iter(weights.values())).device
    return module.eval().requires_grad_(False).to(device)  # buffers that no file holds


def diffsynth_call(
    built: Pipeline, twins: Modules, transformers: Mapping[str, torch.nn.Module], dtype: str
) -> Contestant:
    """Return DiffSynth's pipe as it comes; only its crash in fp32 is fixed."""
    pipe = ZImagePipeline(device=built.pipe.device, torch_dtype=getattr(torch, dtype))
    pipe.tokenizer = built.pipe.tokenizer
    for name, module in twins.items():
        setattr(pipe, name, module)
    for transformer in transformers.values():
        follow_weight_dtype(transformer.t_embedder)

    def draw(asked: Asked) -> Image.Image:
        pipe.dit = transformers[asked.model]
        more: dict[str, Any] = {}
        if asked.mode == "controlnet":
            more["controlnet_inputs"] = [ControlNetInput(image=gradient(asked.side), scale=0.8)]
        if asked.mode == "upscale":
            more |= {"input_image": gradient(asked.side), "denoising_strength": UPSCALE_DENOISE["full"]}
        image: Image.Image = pipe(
            prompt=asked.prompt,
            cfg_scale=asked.cfg,
            seed=asked.seed,
            height=asked.side,
            width=asked.side,
            num_inference_steps=asked.steps,
            sigma_shift=SIGMA_SHIFT,
            progress_bar_cmd=iter,
            **more,
        )
        return image

    return _watching(Contestant("DiffSynth", dtype, draw), pipe)


class _Autoencoder(torch.nn.Module):
    """The miniature's halves behind the interface of diffusers' autoencoders."""

    config = SimpleNamespace(block_out_channels=(1, 1, 1, 1), shift_factor=0.0, scaling_factor=1.0)
    device = torch.device("cpu")

    def __init__(self, twins: Modules) -> None:
        super().__init__()
        self.encoder, self.decoder = twins["vae_encoder"], twins["vae_decoder"]

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return next(self.parameters()).dtype

    def encode(self, images: torch.Tensor) -> SimpleNamespace:
        """Return latents as diffusers' pipelines look for them."""
        return SimpleNamespace(latents=self.encoder(images))

    def decode(self, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        """Return images."""
        return (self.decoder(latents),)


def _autoencoder(diffusers: Any, twins: Modules, kind: WeightsKind, dtype: str) -> Any:
    if kind == "mini":
        return _Autoencoder(twins)
    from diffsynth.utils.state_dict_converters import flux_vae

    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    }
    with torch.device("meta"):
        names = {name: name for name in diffusers.AutoencoderKL(**config).state_dict()}
    # DiffSynth renames each weight: of its names, diffusers' are found by renaming the names themselves.
    weights = {
        theirs: twins[half].state_dict()[name]
        for half, renamed in (
            ("vae_encoder", flux_vae.FluxVAEEncoderStateDictConverterDiffusers),
            ("vae_decoder", flux_vae.FluxVAEDecoderStateDictConverterDiffusers),
        )
        for name, theirs in renamed(names).items()
    }
    return _with_weights(partial(diffusers.AutoencoderKL, **config), weights, dtype)


def diffusers_pipelines(
    built: Pipeline, twins: Modules, transformers: Mapping[str, torch.nn.Module], weights: Weights, dtype: str
) -> Contestant:
    """Return diffusers' pipelines, one a mode."""
    diffusers: Any = importlib.import_module("diffusers")  # loads its names lazily, which hides their types
    parts = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=SIGMA_SHIFT),
        "vae": _autoencoder(diffusers, twins, weights.kind, dtype),
        "text_encoder": twins["text_encoder"].model,
        "tokenizer": built.pipe.tokenizer,
    }
    config = weights.configs["dit"]
    theirs = {
        model: _with_weights(partial(diffusers.ZImageTransformer2DModel, **config), transformer.state_dict(), dtype)
        for model, transformer in transformers.items()
    }
    classes = {
        "generate": diffusers.ZImagePipeline,
        "controlnet": diffusers.ZImageControlNetPipeline,
        "upscale": diffusers.ZImageImg2ImgPipeline,
    }

    @cache
    def pipeline(mode: str, model: Model) -> Any:
        more = {"controlnet": control} if mode == "controlnet" else {}
        made = classes[mode](transformer=theirs[model], **parts, **more)
        made.set_progress_bar_config(disable=True)
        return made

    control = _control(diffusers, twins, config, dtype) if "controlnet" in twins else None

    def draw(asked: Asked) -> Image.Image:
        more: dict[str, Any] = {"num_inference_steps": asked.steps}
        if asked.mode == "controlnet":
            more |= {"control_image": gradient(asked.side), "controlnet_conditioning_scale": 0.8}
        if asked.mode == "upscale":
            # Its steps are a part of those asked for: ask for so many that the same number is taken.
            denoise = UPSCALE_DENOISE["full"]
            more = {"image": gradient(asked.side), "strength": denoise}
            more["num_inference_steps"] = int(asked.steps / denoise)
        image: Image.Image = pipeline(asked.mode, asked.model)(
            prompt=asked.prompt,
            height=asked.side,
            width=asked.side,
            # positive + g (positive - negative) there, negative + s (positive - negative) here
            guidance_scale=asked.cfg - 1,
            generator=torch.Generator("cpu").manual_seed(asked.seed),
            **more,
        ).images[0]
        return image

    contestant = Contestant("diffusers", dtype, draw)
    contestant.meter.watch("encoding", parts["text_encoder"], parts["vae"].encoder)
    contestant.meter.watch("denoising", *theirs.values(), *([control] if control else []))
    contestant.meter.watch("decoding", parts["vae"].decoder)
    return contestant


def _control(diffusers: Any, twins: Modules, transformer: Mapping[str, Any], dtype: str) -> Any:
    net: Any = twins["controlnet"]
    shared = {name: transformer[name] for name in ("dim", "n_heads", "n_kv_heads") if name in transformer}
    make = partial(
        diffusers.ZImageControlNetModel,
        control_layers_places=list(net.control_layers_mapping)[: len(net.control_layers)],
        control_refiner_layers_places=list(range(len(net.control_noise_refiner))),
        control_in_dim=mini.config.CONTROLNET_CONFIG["control_in_dim"],
        n_refiner_layers=len(net.control_noise_refiner),
        add_control_noise_refiner="control_noise_refiner",
        **shared,
    )
    return _with_weights(make, net.state_dict(), dtype)


# --- what is measured -----------------------------------------------------------------------------------------------


def every_mode(side: int, base: Model) -> list[Asked]:
    """Return an image of every mode with its usual steps; `base` is the model that is drawn with guidance."""
    return [
        Asked(side, 8),
        Asked(side, 25, model=base, cfg=4.0),
        Asked(side, 9, mode="controlnet"),
        Asked(side, 5, mode="upscale"),
    ]


def operations(contestant: Contestant, asked: Asked) -> Mapping[str, float]:
    """Return the floating-point operations of each stage's models, and of everything as `total`."""
    meter = contestant.meter
    meter.taken.clear()
    with counted() as counter:
        meter.read = lambda: counter.flops
        contestant.draw(asked)
    return {**meter.taken, "total": counter.flops}


Clock = Callable[[], float]


def clock_of(device: str, busy: bool) -> Clock:
    """Return what tells the seconds: the wall's, with a device's work finished, or this process's own."""
    if busy:
        return time.process_time

    def now() -> float:
        synchronize(device)
        return time.perf_counter()

    return now


def timed(contestant: Contestant, asked: Asked, clock: Clock) -> Mapping[str, float]:
    """Return the seconds of one image: of each stage's models, of the `rest`, and of everything as `total`."""
    meter = contestant.meter
    meter.taken.clear()
    meter.read = clock
    started = clock()
    contestant.draw(asked)
    total = clock() - started
    return {**meter.taken, "rest": total - sum(meter.taken.values()), "total": total}


def extra_memory(contestant: Contestant, asked: Asked) -> float:
    """Return the bytes of anonymous memory that an image takes beside what was held before it (Linux)."""
    peak, before = Peak(), anonymous()
    with host_memory.freed_at_once(), peak.watched():
        contestant.draw(asked)
    return max(peak.bytes - before, 0)


def expected_seconds(flops: Mapping[str, float], dtype: str, speeds: measure.Speeds) -> float:
    """Return about how long operations take on a processor: the VAE's as convolutions, the rest as matrix products."""
    products, convolutions = (1e9 * float(getattr(pair, dtype)) for pair in (speeds.products, speeds.convolution))
    if not products or not convolutions:
        return math.inf
    decoding = flops["decoding"]
    return (flops["total"] - decoding) / products + decoding / convolutions


def in_turn(
    contestants: Sequence[Contestant], asked: Asked, runs: int, clock: Clock
) -> dict[str, tuple[list[Mapping[str, float]], float]]:
    """Return the seconds of each contestant's images, and the bytes that its first one took, which also warms up.

    Each round has a prompt of its own, which is new to everybody.
    """
    rounds = [dataclasses.replace(asked, prompt=prompt) for prompt in itertools.islice(prompts(), runs + 1)]
    memory = {each.title: extra_memory(each, rounds[0]) for each in contestants}
    taken: dict[str, list[Mapping[str, float]]] = {each.title: [] for each in contestants}
    for this in rounds[1:]:
        for each in contestants:
            seconds = timed(each, this, clock)
            taken[each.title].append(seconds)
            print(f"{each.title}: {seconds['total']:.2f} s", file=sys.stderr, flush=True)
    return {title: (taken[title], memory[title]) for title in taken}


def compare(
    contestants: Sequence[Contestant],
    asked: Asked,
    flops: Mapping[str, Mapping[str, float]],
    speeds: measure.Speeds | None,
    runs: int,
    clock: Clock,
) -> list[Figures]:
    """Return a row for each contestant.

    Args:
        contestants: the first is what the others are compared with.
        asked: what is drawn.
        flops: the operations that it takes each of them, by name.
        speeds: of the processor, where that is what computes.
        runs: counted rounds.
        clock: tells the seconds.
    """
    drawn = in_turn(contestants, asked, runs, clock)
    first, rows = contestants[0].title, []
    for each in contestants:
        (taken, memory), (reference, _) = drawn[each.title], drawn[first]
        totals = [seconds["total"] for seconds in taken]
        ratios = [ours["total"] / seconds for ours, seconds in zip(reference, totals, strict=True)]
        stages = {stage: statistics.median(seconds.get(stage, 0.0) for seconds in taken) for stage in (*STAGES, "rest")}
        operations = flops[each.name]["total"]
        row: Figures = {
            "pipeline": each.title,
            "seconds": round(statistics.median(totals), 3),
            "from": round(min(totals), 3),
            "to": round(max(totals), 3),
            "ours_by_its_seconds": round(statistics.median(ratios), 3),
            "tflop": round(operations / 1e12, 4),
            "ours_by_its_flops": round(flops[contestants[0].name]["total"] / operations, 3),
            "stages": {stage: round(seconds, 4) for stage, seconds in stages.items()},
        }
        if speeds:
            floor = operations / (getattr(speeds.products, each.dtype) * 1e9)
            row |= {"floor": round(floor, 3), "memory_mb": round(memory / 1e6)}
        rows.append(row)
    return rows


# --- the command ----------------------------------------------------------------------------------------------------


def count(weights: Weights, cases: Sequence[Asked]) -> dict[Asked, dict[str, Mapping[str, float]]]:
    """Return the operations of each pipeline, by its name, for the cases and for every mode."""
    built = for_counting(weights)
    plain = others(built, weights, built.dtype_name)
    alone = ours(built)
    contestants = [alone, alone.second_seed(), *plain]
    every = every_mode(min(case.side for case in cases), "base" if "base" in weights.chosen else "turbo")
    found = {}
    for asked, prompt in zip(dict.fromkeys((*cases, *every)), prompts(), strict=False):
        this = dataclasses.replace(asked, prompt=prompt)  # new, so that nobody knows it yet
        found[asked] = {each.name: operations(each, this) for each in contestants}
    return found


def measured(weights: Weights, cases: Sequence[Asked], args: argparse.Namespace, speeds: measure.Speeds) -> Figures:
    """Return the operations of every mode, and what the cases take."""
    flops = count(weights, cases)
    tflop = {
        asked.title: {name: round(each["total"] / 1e12, 5) for name, each in theirs.items()}
        for asked, theirs in flops.items()
    }
    found: Figures = {"weights": weights.title, "tflop": tflop, "cases": []}
    if args.count_only:
        return found
    engine, built = engine_with(weights, args.device)
    on = str(built.pipe.device)
    clock = clock_of(on, args.busy)
    requested = ours_through(engine, built)
    plain: dict[str, list[Contestant]] = {}
    for case in cases:
        contestants, left_out = [requested, requested.second_seed()], {}
        for dtype in dict.fromkeys((requested.dtype, THEIR_DEFAULT)):
            seconds = expected_seconds(flops[case]["DiffSynth"], dtype, speeds) if on == "cpu" else 0.0
            if seconds > args.longest:
                left_out[dtype] = f"an image would take about {seconds:.0f} s"
                continue
            if dtype not in plain:
                plain[dtype] = others(built, weights, dtype)
            contestants += plain[dtype]
        print(f"{weights.title}: {case.title}", file=sys.stderr, flush=True)
        rows = compare(contestants, case, flops[case], speeds if on == "cpu" else None, args.runs, clock)
        found["cases"].append({"case": case.title, "rows": rows, "left_out": left_out})
    return found


def facts(args: argparse.Namespace, speeds: measure.Speeds) -> Figures:
    """Return what the figures hold for."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False)
    commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit + (" and changes" if changed else ""),
        "processor": measure.processor(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffsynth", "diffusers")},
        "gflops": {
            work: dataclasses.asdict(getattr(speeds, work)) for work in ("products", "convolution", "attention")
        },
        "runs": args.runs,
        "clock": "processor" if args.busy else "wall",
    }


def markdown(found: Figures) -> str:
    """Return the tables of one kind of weights."""
    names = next(iter(found["tflop"].values()))
    lines = [f"## {found['weights'].capitalize()}", "", "TFLOP an image, and ours by theirs:", ""]
    lines += [f"| image | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for title, tflop in found["tflop"].items():
        ours_first = tflop["ours"]
        cells = [
            f"{each:.4g} ({ours_first / each:.3f})" if name != "ours" else f"{each:.4g}" for name, each in tflop.items()
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    for case in found["cases"]:
        heads = ["pipeline", "seconds", "ours by its", "in FLOP", *STAGES, "rest", "floor", "memory, MB"]
        lines += ["", f"{case['case']}:", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        lines += [_row(row) for row in case["rows"]]
        lines += [f"| {dtype} | left out: {why} |{' |' * (len(heads) - 2)}" for dtype, why in case["left_out"].items()]
    return "\n".join(lines) + "\n"


def _row(row: Figures) -> str:
    total = sum(row["stages"].values())
    floor = f"{row['floor'] / row['seconds']:.0%}" if "floor" in row else ""
    cells = [
        row["pipeline"],
        f"{row['seconds']:.3g} ({row['from']:.3g} to {row['to']:.3g})",
        f"{row['ours_by_its_seconds']:.2f}",
        f"{row['ours_by_its_flops']:.2f}",
        *(f"{seconds / total:.1%}" for seconds in row["stages"].values()),
        floor,
        str(row.get("memory_mb", "")),
    ]
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> None:
    """Measure, print tables, and add a line to the history."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", choices=["miniature", "wide"], default=["miniature", "wide"])
    parser.add_argument("--layers", type=int, default=3, help="of the real width's transformer")
    parser.add_argument("--encoder-layers", type=int, default=3)
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512], help="of the real width's images")
    parser.add_argument("--steps", type=int, default=4, help="of the real width's images")
    parser.add_argument("--runs", type=int, default=5, help="counted rounds; the medians are reported")
    parser.add_argument("--longest", type=float, default=120, help="seconds an image of theirs may be expected to take")
    parser.add_argument("--count-only", action="store_true", help="operations alone, which take seconds to count")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--busy", action="store_true", help="one thread, whose own processor time counts, not the wall's"
    )
    parser.add_argument("--history", type=Path, default=ROOT / "bench" / "history.jsonl")
    args = parser.parse_args(argv)

    if args.busy:
        torch.set_num_threads(1)
    speeds = measure.measure()
    line = facts(args, speeds) | {"weights": []}
    # The real width is measured at 256 x 256 too, which the program does not let through.
    sizes = dataclasses.replace(IMAGE_SIZES["full"], minimum=16)
    with tempfile.TemporaryDirectory() as folder, patch.dict(IMAGE_SIZES, full=sizes):
        for name in args.weights:
            if name == "miniature":
                weights, cases = miniature(), list(MINIATURE_CASES)
            else:
                weights = wide(Path(folder), FewLayers(args.layers, args.encoder_layers))
                cases = [Asked(side, args.steps) for side in args.sides]
            line["weights"].append(measured(weights, cases, args, speeds))
            print(markdown(line["weights"][-1]), flush=True)
    if not args.count_only:
        with args.history.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
