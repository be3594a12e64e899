"""The engine: one request at a time through one pipeline, as a generator of events.

Every front calls `Engine.run(request)` and gets `Queued` while others come first, `Stage` and `Step` while the work is
done, then one `Result` or one `Failure`; closing the generator cancels the request within a step. Importing this module
loads no torch: the pipeline is built by the first request.
"""

from __future__ import annotations

import datetime
import gc
import logging
import os
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mini.notes
from core import environment, metadata
from core.errors import InternalError, OutOfMemory, SpaceOutOfMemory, StudioError, WeightsMissing
from core.events import Event, Failure, Queued, Result, Stage
from core.messages import Message
from core.request import MODELS, PREPROCESSORS, ControlNet, Preprocess, Request, TextToImage, Upscale, WeightsChoice
from core.sizes import IMAGE_SIZES, WeightsKind
from diffusion import memory, tokens
from diffusion.device import Device, choose_device
from engine import estimate, mode_upscale, zerogpu
from engine.drawing import file_of, wearing
from engine.fair_queue import FairQueue
from engine.mode import Drawing, Drawn, T
from engine.timing import Stopwatch
from engine.zerogpu import Packed
from hub import checkpoint, inventory
from images import preprocess
from images.cache import Controls
from lora.file import Report, read

if TYPE_CHECKING:
    from PIL import Image

    from diffusion.pipeline import Pipeline

log = logging.getLogger(__name__)

QUEUE_LIMIT = 32  # waiting requests; about as many as people are willing to wait behind
ESTIMATE_SAID = 10.0  # seconds from which a visitor wants to know how long it will take
POLL_SECONDS = 0.25  # how often a waiting request says that it waits, and so can be cancelled


@dataclass(frozen=True)
class Settings:
    """What holds for a whole process.

    Attributes:
        weights: which weights to use.
        device: which device to use.
        memory_gb: how many GB (10^9 bytes) of the device's memory to count with; None takes what is free.
        queue_limit: how many requests may wait.
    """

    weights: WeightsChoice = "auto"
    device: str = "auto"
    memory_gb: float | str | None = None
    queue_limit: int = QUEUE_LIMIT


class Engine:
    """Owns the pipeline and the queue in front of it. One instance serves every front of a process."""

    def __init__(self, settings: Settings = Settings()) -> None:
        self.settings = settings
        self._turns = FairQueue(settings.queue_limit)
        self._pipeline: Pipeline | None = None
        self._built_for: WeightsKind | None = None
        self._device: Device | None = None
        self._plan: memory.MemoryPlan | None = None
        self._tighter = 0  # how many plans were given up because the memory did not suffice
        self._forecast = estimate.Forecast()
        self._controls = Controls()
        self._packed = Packed()  # filled by `load_for_zerogpu`
        # Each mode's way from a resolved request to a picture; what all modes share is in `_work`.
        # Any: each takes requests of its own key's type.
        self._modes: Mapping[type[Request], Callable[[inventory.Chosen, Any], Drawing]] = {
            TextToImage: self._text_to_image,
            ControlNet: self._structure_to_image,
            Upscale: self._upscale,
        }
        self._upscale_speed: dict[str, float] = {}  # seconds per operation as measured, by upscaler

    def weights_in_use(self, mode: str, model: str, asked: WeightsChoice = "auto") -> inventory.Chosen:
        """Return which weights a request would use; a request's own choice comes before the process's.

        Raises:
            WeightsMissing: they are not complete on this machine.
        """
        if self._packed:
            return self._packed.of(mode, model, asked)
        return inventory.choose(asked if asked != "auto" else self.settings.weights, mode, model)

    def memory_in_use(self) -> str:
        """Say what of the real weights stays in memory, once a request has loaded them; empty before and otherwise."""
        if self._plan is None or self._built_for != "full":
            return ""
        return f"Memory: {'; '.join(self._plan.reasons)}"

    def count_tokens(self, request: type[Request], prompt: str) -> int | None:
        """Return how many of the text encoder's tokens a prompt takes; None without its tokenizer."""
        model = request.model_fields["model"].default if "model" in request.model_fields else request.model
        try:
            files = self.weights_in_use(request.mode, model).files["tokenizer"]
        except WeightsMissing:
            return None
        return tokens.count(files[0], prompt)

    def inspect_lora(self, path: Path) -> Report:
        """Return what a LoRA file is, from its header alone.

        Raises:
            RequestError: it cannot be used at all.
        """
        return read(path).report

    def control_image(self, request: Preprocess) -> preprocess.Control:
        """Return the control image of a request, of the size that its picture will have.

        Works beside the queue, on the processor. A picture is drawn with the very image that was shown before it.

        Raises:
            RequestError: the picture cannot be used.
            WeightsMissing: the preprocessor's model is not on this machine.
        """
        try:
            return self._controls.of(request, IMAGE_SIZES[self._kind_for_control(request.weights)])
        except StudioError:
            raise
        except MemoryError as error:
            raise OutOfMemory("the memory did not suffice for the picture; a smaller one needs less") from error
        except Exception as error:
            log.exception("internal error")
            raise InternalError(type(error).__name__, str(error)) from error

    def _kind_for_control(self, asked: WeightsChoice) -> WeightsKind:
        """Return whose sizes a control image has; a ControlNet that is missing is the drawing's concern."""
        for mode in (ControlNet.mode, TextToImage.mode):
            try:
                return self.weights_in_use(mode, ControlNet.model, asked).kind
            except WeightsMissing:
                continue
        return "full"

    def examples(self, kind: WeightsKind) -> list[str]:
        """Return prompts that work with these weights."""
        return list(mini.notes.EXAMPLES[kind])

    def run(self, request: Request, client: str = "") -> Generator[Event, None, None]:
        """Carry out one request, as events.

        Args:
            request: a validated request of any mode.
            client: who asks; the queue is fair among clients.

        Yields:
            `Queued` while waiting, `Stage` and `Step` while working, then one `Result` or one `Failure`.
        """
        try:
            yield from self._events(request, client)
        except StudioError as error:
            log.info("no picture: %s", error)
            yield Failure.of(error)

    def draw(self, request: Request, client: str = "") -> Result:
        """Carry out one request and wait for its picture: `run` for notebooks and scripts.

        Raises:
            StudioError: whatever `run` would have yielded as a `Failure`.
        """
        *_, result = self._events(request, client)
        assert isinstance(result, Result)  # anything else would have been raised
        return result

    def _events(self, request: Request, client: str) -> Generator[Event, None, None]:
        try:
            with self._turns.ticket(client) as ticket:
                while ahead := self._turns.wait(ticket, POLL_SECONDS):
                    yield Queued(ahead)
                yield from self._through_zerogpu(request) if self._packed else self._work(request)
        except GeneratorExit:
            log.info("cancelled: %s", request.mode)
            raise
        except StudioError:
            raise
        except Exception as error:
            raise self._translate(error) from error

    def load_for_zerogpu(self) -> None:
        """Load every model that is on this machine, in the calling thread, and draw in ZeroGPU's forks from now on.

        Call it in the main thread, before `Blocks.launch`: ZeroGPU emulates CUDA in that thread alone, and packs there
        what lies on "cuda". Packing may delete files that were mapped, so nothing is looked for on disk afterwards.

        Raises:
            StudioError: there is no model to draw with, or the memory does not suffice.
        """
        requests: list[TextToImage | ControlNet | Upscale] = [
            ControlNet.parse(prompt="-", image="-"),  # first: its memory plan has room for all
            *(TextToImage.parse(prompt="-", model=model) for model in reversed(list(MODELS))),
            Upscale.parse(image="-"),
        ]
        packed = Packed()
        for request in requests:
            try:
                chosen = self.weights_in_use(request.mode, request.model, request.weights)
            except WeightsMissing as error:
                log.warning("not on this Space: %s", error)
                continue
            if packed and chosen.kind != packed.kind:
                continue  # one pipeline has one kind of weights
            for event in self._ready(chosen, request.resolved(chosen.kind)):
                log.info("%s", event)
            packed.add(request.mode, request.model, chosen)
        if not packed:
            raise WeightsMissing("this Space has no weights to draw with: see the log")
        self._packed = packed
        zerogpu.use(self._in_fork)
        os.register_at_fork(after_in_child=self._controls.unlock)

    def _through_zerogpu(self, request: Request) -> Generator[Event, None, None]:
        """Do in this process what needs no GPU, refusing what is wrong, and the rest in one that has one."""
        chosen = self.weights_in_use(request.mode, request.model, request.weights)
        request = request.resolved(chosen.kind)
        file_of(request, chosen.kind)
        prepared = None
        if isinstance(request, Upscale):
            size = mode_upscale.size_after(mode_upscale.open_input(Path(request.image)).image.size)
        elif isinstance(request, ControlNet):
            yield Stage("preprocessing", PREPROCESSORS[request.preprocessor].title)
            prepared = self.control_image(request)
            size = prepared.image.size
        else:
            size = request.width, request.height
        assert self._device is not None  # `load_for_zerogpu` came first
        assert self._plan is not None
        self._forecast.check(request, chosen.kind, size, self._device, self._plan)
        yield from zerogpu.carry_out(zerogpu.Task(request, size, prepared))

    def _in_fork(self, task: zerogpu.Task) -> Generator[Event, None, None]:
        """Carry out a task in the fork; what goes wrong is an event, and leaves the models where they are."""
        try:
            if task.prepared is not None:
                assert isinstance(task.request, Preprocess)  # for such alone something is prepared
                self._controls.keep(
                    task.request, IMAGE_SIZES[self._kind_for_control(task.request.weights)], task.prepared
                )
            yield from self._work(task.request)
        except Exception as error:
            yield Failure.of(error if isinstance(error, StudioError) else self._translate(error))

    def _work(self, request: Request) -> Generator[Event, None, None]:
        clock = Stopwatch()
        chosen = self.weights_in_use(request.mode, request.model, request.weights)
        request = request.resolved(chosen.kind)
        log.info("%s with %s weights: %s", request.mode, chosen.kind, request.model_dump_json())

        drawn = yield from clock.watch(self._within_memory(chosen, request))
        seconds = clock.read()
        self._forecast.learn(request, chosen.kind, drawn.image.size, seconds)

        fingerprints = {
            part: self._packed.fingerprints.get(part) or checkpoint.fingerprint(files)
            for part, files in chosen.files.items()
        }
        fingerprints |= drawn.fingerprints
        provenance = metadata.Provenance(chosen.kind, fingerprints, drawn.inputs, drawn.lora)
        yield Result(
            png=metadata.encode_png(drawn.image, request, provenance),
            sidecar={
                **metadata.describe(request, provenance),
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "seconds": seconds,
                "notes": [str(note) for note in drawn.notes],
            },
            request=request,
            size=drawn.image.size,
            weights=chosen.kind,
            weights_note=chosen.reason,
            seconds=seconds,
            notes=drawn.notes,
        )

    def _within_memory(self, chosen: inventory.Chosen, request: Request) -> Drawing:
        """Draw; where the memory does not suffice, once more under a tighter plan, which then stays."""
        try:
            return (yield from self._modes[type(request)](chosen, request))
        except Exception as error:
            if not memory.is_out_of_memory(error) or self._plan is None or self._plan.tightest or self._packed:
                raise
            log.warning("out of memory, trying again with less: %s", error)
        # Outside of the handler: the exception held what was half-done.
        self._drop_pipeline()
        self._tighter += 1
        yield Stage("loading", "again, since the memory did not suffice")
        drawn = yield from self._modes[type(request)](chosen, request)
        text = "The memory did not suffice at first; drawn with a tighter plan: {plan}."
        note = Message("less_memory", text, plan=self._plan.reasons if self._plan else ())
        return replace(drawn, notes=(*drawn.notes, note))

    def _text_to_image(self, chosen: inventory.Chosen, request: TextToImage) -> Drawing:
        assert request.steps is not None  # it is resolved
        assert request.cfg is not None
        assert request.width is not None
        assert request.height is not None
        file = file_of(request, chosen.kind)
        pipeline = yield from self._ready(chosen, request, (request.width, request.height))
        prompt, left_open = mini.notes.completed(request, chosen.kind)
        draw = partial(
            pipeline.text_to_image,
            prompt=prompt,
            negative_prompt=request.negative_prompt,
            steps=request.steps,
            cfg=request.cfg,
            width=request.width,
            height=request.height,
            seed=request.seed,
        )
        picture, worn = yield from wearing(pipeline, file, request, draw)
        notes = (*picture.notes, *worn.notes, *left_open, *mini.notes.about(request, chosen.kind))
        return Drawn(picture.image, notes, worn.inputs, lora=worn.lora)

    def _structure_to_image(self, chosen: inventory.Chosen, request: ControlNet) -> Drawing:
        assert request.steps is not None  # it is resolved
        yield Stage("preprocessing", PREPROCESSORS[request.preprocessor].title)
        control = self.control_image(request)
        file = file_of(request, chosen.kind)
        pipeline = yield from self._ready(chosen, request, control.image.size)
        width, height = control.image.size
        # Where the control image says nothing, the seed does, as without one.
        prompt, left_open = (request.prompt, []) if request.scale else mini.notes.completed(request, chosen.kind)
        draw = partial(
            pipeline.text_to_image,
            prompt=prompt,
            negative_prompt="",
            steps=request.steps,
            cfg=MODELS[request.model].cfg,
            width=width,
            height=height,
            seed=request.seed,
            control=(control.image, request.scale),
        )
        picture, worn = yield from wearing(pipeline, file, request, draw)
        notes = (*control.notes, *picture.notes, *worn.notes, *left_open, *mini.notes.about(request, chosen.kind))
        return Drawn(picture.image, notes, {"image": control.digest, **worn.inputs}, lora=worn.lora)

    def _upscale(self, chosen: inventory.Chosen, request: Upscale) -> Drawing:
        opened = mode_upscale.open_input(Path(request.image))
        size = mode_upscale.size_after(opened.image.size)
        pipeline = (yield from self._ready(chosen, request, size)) if request.denoise else None
        yield Stage("loading", "program")
        on, plan = self._planned_upscale(chosen.kind)
        image, source = yield from self._measured(
            mode_upscale.enlarge(opened.image, request.upscaler, on.kind, plan),
            request.upscaler,
            mode_upscale.operations(opened.image.size, request.upscaler, plan.upscaler_tile),
        )
        notes = [*opened.notes]
        if pipeline is not None:
            image, picture = yield from mode_upscale.refine(pipeline, image, request, chosen.kind, plan)
            notes += picture.notes
        notes += mode_upscale.notes(request, chosen.kind, source, image.size, plan)
        return Drawn(image, tuple(notes), {"image": opened.digest}, {"upscaler": source.fingerprint})

    def upscale_estimate(self, request: Upscale) -> mode_upscale.Estimate:
        """Return what a request will give and take, before it is run; the first time it imports torch.

        Raises:
            RequestError: the picture cannot be used.
            WeightsMissing: nothing could refine it.
        """
        size = mode_upscale.open_input(Path(request.image)).image.size
        kind = self.weights_in_use(request.mode, request.model, request.weights).kind
        on, plan = self._planned_upscale(kind)
        speed, drawing = self._upscale_speed.get(request.upscaler), self._forecast.throughput(kind, on)
        return mode_upscale.estimate(size, request.resolved(kind), kind, plan, on.kind, speed, drawing)

    def plain_enlargement(self, request: Upscale) -> Image.Image:
        """Return the picture of a request at the size of its result, made by a filter: what to compare it with.

        Raises:
            RequestError: the picture cannot be used.
        """
        return mode_upscale.plain(mode_upscale.open_input(Path(request.image)).image)

    def _measured(self, work: Generator[Event, None, T], upscaler: str, operations: float) -> Generator[Event, None, T]:
        """Pass work on, and note how fast it was for the next estimate."""
        clock = Stopwatch()
        done = yield from clock.watch(work)
        self._upscale_speed[upscaler] = clock.read()["upscaling"] / operations
        return done

    def _ready(
        self,
        chosen: inventory.Chosen,
        request: TextToImage | ControlNet | Upscale,
        size: tuple[int, int] | None = None,
    ) -> Generator[Event, None, Pipeline]:
        """Return the pipeline with the request's models loaded, built anew where the kind of weights changed.

        Args:
            chosen: the weights to use.
            request: the resolved request.
            size: width and height of the picture, to refuse what is hopeless; None where nothing is drawn yet.

        Raises:
            OutOfMemory: the weights cannot be used on this machine at all.
            RequestError: a picture of this size and number of steps is hopeless here.
        """
        planned = self._plan is not None and (
            "controlnet" in self._plan.parts or "controlnet" not in chosen.files
        )  # a plan made without it may not leave room for it
        if self._pipeline is None or self._built_for != chosen.kind or not planned:
            yield Stage("loading", "program")  # torch and diffsynth take seconds to import
            self._drop_pipeline()
            environment.prepare_environment(os.environ)
            import torch

            from diffusion.pipeline import Pipeline

            on, plan = self._planned(request.mode, chosen.kind)
            log.info("%s; %s", on.reason, "; ".join(plan.reasons))
            if not plan.fits:
                advice = "Weights mini draws with the miniature; --memory GB counts with more than is free."
                if environment.on_space():
                    advice = "Its owner can choose larger hardware for this Space."
                raise OutOfMemory(f"these weights do not fit this machine: {'; '.join(plan.reasons)}. {advice}")
            self._device, self._plan = on, plan
            dtype = getattr(torch, on.dtype)
            self._pipeline = Pipeline(
                on.kind, dtype, plan.keep_both_transformers, plan.lora_copies, plan, zerogpu.ACTIVE
            )
            self._built_for = chosen.kind
        if size is not None:
            yield from self._expect(chosen, request, size)
        yield from self._pipeline.load(chosen, request.model)
        return self._pipeline

    def _expect(
        self, chosen: inventory.Chosen, request: Request, size: tuple[int, int]
    ) -> Generator[Event, None, None]:
        """Say what a request will take, where that is long; refuse what is hopeless."""
        assert self._device is not None  # `_ready` came first
        assert self._plan is not None
        expected = self._forecast.check(request, chosen.kind, size, self._device, self._plan)
        log.info("estimate: %s (%s throughput)", expected, expected.source)
        if expected.seconds >= ESTIMATE_SAID:
            yield Stage("estimating", str(expected))

    def _planned(self, mode: str, kind: WeightsKind) -> tuple[Device, memory.MemoryPlan]:
        """Look at this machine as it is now; imports torch."""
        environment.prepare_environment(os.environ)
        on = choose_device(self.settings.device, kind)
        return on, memory.plan_for(on, mode, kind, memory_gb=self.settings.memory_gb, tighter=self._tighter)

    def _planned_upscale(self, kind: WeightsKind) -> tuple[Device, memory.MemoryPlan]:
        """Return the plan that models were loaded by, where they are: they are not free memory any more."""
        if self._packed:  # the page's process has no GPU to look at
            assert self._device is not None  # `load_for_zerogpu` came first
            assert self._plan is not None
            return self._device, self._plan
        on, plan = self._planned(Upscale.mode, kind)
        return on, self._plan or plan

    def _drop_pipeline(self) -> None:
        if self._packed:
            return  # they could not be loaded again: see `load_for_zerogpu`
        self._pipeline = self._built_for = self._plan = None
        gc.collect()  # modules hold cycles

    def _translate(self, error: Exception) -> StudioError:
        """Turn a foreign exception into one of ours, by its type; whatever it left half-done is dropped."""
        self._drop_pipeline()
        if memory.is_out_of_memory(error):
            log.warning("out of memory: %s", error)
            if environment.on_space():
                return SpaceOutOfMemory()
            return OutOfMemory(
                "the memory did not suffice, also with the tightest plan; choose a smaller width and height, draw "
                "without a LoRA, or close other programs that use the memory"
            )
        log.exception("internal error")
        return InternalError(type(error).__name__, str(error))
