"""What carries resolved requests out: the worker of this process, which owns the pipeline and the plan of its memory.

Importing this module loads no torch: the pipeline is built by the first request.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from core import environment
from core.errors import InternalError, OutOfMemory, RequestError, SpaceOutOfMemory, StudioError, WeightsMissing
from core.events import Event, Stage
from core.messages import Message
from core.request import ControlNet, Model, Preprocess, Resolved, TextToImage, Upscale, WeightsChoice
from core.sizes import IMAGE_SIZES, WeightsKind
from core.upload import Upload
from diffusion import lazy_imports
from diffusion.device import Device, choose_device
from diffusion.memory import MemoryPlan, is_out_of_memory, plan_for
from engine import estimate, mode_upscale
from engine.mode import Drawing, Drawn, Job, Prepared
from engine.modes import MODES
from engine.timing import Returning, Stopwatch
from hub import fine_tunes, inventory
from hub.checkpoint import Mark, fingerprint, flat, mark
from images.cache import Controls
from images.preprocess import Control

if TYPE_CHECKING:
    from diffusion.pipeline import Pipeline

log = logging.getLogger(__name__)

PROGRAM = "diffusion.pipeline"
QUEUE_LIMIT = 256  # waiting requests: a lecture hall; each costs next to nothing
CLIENT_LIMIT = 16  # waiting requests of one address
POLL_SECONDS = 0.25  # how often a request that waits for a warm-up says so, and so can be cancelled
ESTIMATE_SHOWN = 10.0  # seconds from which a visitor wants to know how long it will take


@dataclass(frozen=True)
class Settings:
    """What holds for a whole process.

    Attributes:
        weights: which weights to use.
        device: which device to use.
        dtype: what the real weights are to compute in, "auto", "bf16" or "fp32"; None takes Z_IMAGE_DTYPE, else "auto".
        memory_gb: how many GB (10^9 bytes) of the device's memory to count with; None takes what is free.
        queue_limit: how many requests may wait.
        client_limit: how many requests of one client may wait; 0 for as many as of all.
    """

    weights: WeightsChoice = "auto"
    device: str = "auto"
    dtype: str | None = None
    memory_gb: float | str | None = None
    queue_limit: int = QUEUE_LIMIT
    client_limit: int = CLIENT_LIMIT


@dataclass(frozen=True)
class Outlook:
    """What drawing with the real weights would be like on this machine.

    Attributes:
        plan: what of them would stay in memory, and why.
        size: width and height of the picture that is estimated, in pixels.
        steps: its steps.
        expected: what it would take.
        refused: why it would not be drawn; None where it would.
    """

    plan: tuple[Message, ...]
    size: tuple[int, int]
    steps: int
    expected: estimate.Estimate
    refused: Message | None = None


class Worker(Protocol):
    """What carries resolved requests out, one at a time, wherever it is."""

    def weights(self, mode: str, model: Model, asked: WeightsChoice, checkpoint: str = "") -> inventory.Chosen:
        """Return which weights a request would use; a request's own choice comes before the process's.

        Args:
            mode: the request's.
            model: which model draws, or the checkpoint is used as.
            asked: the request's choice.
            checkpoint: the user's own, as it was named.

        Raises:
            RequestError: the checkpoint cannot be used.
            WeightsMissing: they are not complete on this machine.
        """
        ...

    def memory(self) -> Message | None:
        """Return what of the real weights stays in memory, once a request has loaded them."""
        ...

    def control_image(self, request: Preprocess) -> Control:
        """Return the control image of a request, of the size that its picture will have.

        Works beside the requests, on the processor. A picture is drawn with the very image that was shown before it.

        Raises:
            RequestError: the picture cannot be used.
            WeightsMissing: the preprocessor's model is not on this machine.
        """
        ...

    def foresee(self, request: Upscale) -> mode_upscale.Foreseen:
        """Return what a request will give and take, before it is run; the first time it imports torch.

        Raises:
            RequestError: the picture cannot be used.
            WeightsMissing: nothing could refine it.
        """
        ...

    def outlook(self) -> Outlook:
        """Return what a usual picture would take with the real weights, wherever they are; imports torch."""
        ...

    def warm_up(self) -> None:
        """Begin to make ready for a first request, and return at once; safe to call at any time, and often."""
        ...

    def draw(self, request: Resolved, chosen: inventory.Chosen) -> Drawing:
        """Carry out a request, as events; closing the generator cancels it within a step.

        Raises:
            StudioError: there is no picture, and why; the next request works.
        """
        ...


class LocalWorker:
    """Draws in this process."""

    emulated = False  # whether the device is one that ZeroGPU only emulates as yet

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.pipeline: Pipeline | None = None
        self.kind: WeightsKind | None = None  # of the weights that the pipeline was built for
        self.device: Device | None = None
        self.plan: MemoryPlan | None = None
        self.forecast = estimate.Forecast()
        self.controls = Controls()
        self._read: dict[Path, Mark] = {}  # of each file that the pipeline was loaded from
        self._tighter = 0  # how many plans were given up because the memory did not suffice
        self._begun, self._beginning = False, threading.Lock()  # whether a warm-up or a request has begun
        self._warming = threading.Thread(target=self._warm_up, name="warm-up")

    def weights(self, mode: str, model: Model, asked: WeightsChoice, checkpoint: str = "") -> inventory.Chosen:
        """Return which weights a request would use, as `Worker.weights`."""
        weights = asked if asked != "auto" else self.settings.weights
        if checkpoint:
            return fine_tunes.choose(fine_tunes.find(checkpoint), weights, mode, model)
        return inventory.choose(weights, mode, model)

    def memory(self) -> Message | None:
        """Return what of the real weights stays in memory, as `Worker.memory`."""
        if self.plan is None or self.kind != "full":
            return None
        return Message("memory", "Memory: {plan}", plan=self.plan.reasons)

    def control_image(self, request: Preprocess) -> Control:
        """Return the control image of a request, as `Worker.control_image`."""
        try:
            upload = Upload.open(Path(request.image))
            return self.controls.of(request, upload, IMAGE_SIZES[self._kind_for_control(request.weights)])
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
                return self.weights(mode, ControlNet.model, asked).kind
            except WeightsMissing:
                continue
        return "full"

    def foresee(self, request: Upscale) -> mode_upscale.Foreseen:
        """Return what a request will give and take, as `Worker.foresee`."""
        before = mode_upscale.open_input(Upload.open(Path(request.image))).image.size
        kind = self.weights(request.mode, request.model, request.weights).kind
        device, plan = self.machine(request.mode, kind)
        after = mode_upscale.size_after(before)
        work = MODES[request.mode].work(request.resolved(kind), kind, after, plan)
        expected = self.forecast.estimate(work, device, plan)
        tiles, refined = mode_upscale.tiles_of(before, plan.upscaler_tile), work.tiles if work.steps else 0
        measured = expected.source == "measured"
        return mode_upscale.Foreseen(before, after, tiles, refined, expected.seconds, measured)

    def outlook(self) -> Outlook:
        """Return what a usual picture would take with the real weights, as `Worker.outlook`."""
        device, plan = self.machine(TextToImage.mode, "full")
        request = TextToImage.parse(prompt="an apple").resolved("full")
        work = MODES[request.mode].work(request, "full", (request.width, request.height), plan)
        refused = None
        try:
            estimate.check(work, plan, device.dtype, self.forecast.speed(work, device))
        except RequestError as error:
            refused = error.message.values["allowed"]
        expected = self.forecast.estimate(work, device, plan)
        return Outlook(plan.reasons, (work.width, work.height), work.steps, expected, refused)

    def warm_up(self) -> None:
        """Import the program, and load the miniature where that would draw, in a thread of its own; only once.

        The real weights stay on the disk: they take minutes, and memory that others may need. A request that comes
        meanwhile waits; once one has begun, there is nothing left to warm up.
        """
        with self._beginning:
            if not self._begun:
                self._begun = True
                self._warming.start()

    def _warm_up(self) -> None:
        mode, model = TextToImage.mode, TextToImage.usual_model()
        try:
            environment.prepare_environment(os.environ)
            lazy_imports.load(PROGRAM)
            chosen = self.weights(mode, model, "auto")
            if chosen.kind == "mini":
                for _ in self._build(mode, chosen):
                    pass
                assert self.pipeline is not None  # it was built just now
                for _ in self.pipeline.load(chosen, model):
                    pass
        except Exception as error:  # a request meets it again, and tells somebody
            log.warning("not warmed up: %s", error)
            self.drop()
        else:
            log.info("warmed up")

    def _begin(self) -> Iterator[Stage]:
        """Wait until a warm-up has ended that is under way; there will be no other."""
        with self._beginning:
            self._begun = True
        while self._warming.is_alive():
            yield Stage("starting")
            self._warming.join(POLL_SECONDS)

    def draw(self, request: Resolved, chosen: inventory.Chosen, prepared: Prepared | None = None) -> Drawing:
        """Carry out a request, as `Worker.draw`.

        Where the memory does not suffice, it is carried out once more under a tighter plan, which then stays.

        Args:
            request: what to draw.
            chosen: the weights to draw it with.
            prepared: what another process has made of the request's files.
        """
        clock, tightened = Stopwatch(), False
        for stage in self._begin():
            clock.see(stage)
            yield stage
        try:
            while True:
                run = Returning(self._run(request, chosen, prepared))
                try:
                    with closing(run):
                        for event in run:
                            clock.see(event)
                            yield event
                    break
                except Exception as error:
                    if not self._may_try_again(error):
                        raise
                    log.warning("out of memory, trying again with less: %s", error)
                # Outside of the handler: the exception held what was half-done.
                self.drop()
                self._tighter += 1
                yield Stage("loading", Message("less_memory", "again, since the memory did not suffice"))
                tightened = True
        except StudioError:
            raise
        except Exception as error:
            raise self._translated(error) from error
        drawn, seconds = run.value, clock.read()
        self._learn(request, chosen, drawn, seconds)
        notes = drawn.notes
        if tightened:
            text = "The memory did not suffice at first; drawn with a tighter plan: {plan}."
            notes = (*notes, Message("less_memory", text, plan=self.plan.reasons if self.plan else ()))
        fingerprints = {**self.fingerprints(chosen), **drawn.fingerprints}
        return replace(drawn, notes=notes, fingerprints=fingerprints, seconds=seconds)

    def _run(self, request: Resolved, chosen: inventory.Chosen, prepared: Prepared | None) -> Drawing:
        mode = MODES[request.mode]
        if prepared is None:
            prepared = yield from mode.prepare(request, chosen.kind, self.controls)
        if prepared.lora is None and self.pipeline is not None:
            self.pipeline.lora_copies.forget()  # plans count with their memory where a picture has no LoRA
        return (yield from mode.draw(self, Job(request, chosen, prepared)))

    def _learn(self, request: Resolved, chosen: inventory.Chosen, drawn: Drawn, seconds: Mapping[str, float]) -> None:
        _, plan = self.machine(request.mode, chosen.kind)
        work = MODES[request.mode].work(request, chosen.kind, drawn.image.size, plan)
        self.forecast.learn(work, seconds)

    def fingerprints(self, chosen: inventory.Chosen) -> Mapping[str, str]:
        """Return the identity of each part's files."""
        return {part: fingerprint(files) for part, files in chosen.files.items()}

    def load(self, job: Job[Any]) -> Generator[Event, None, Pipeline]:
        """Return the pipeline with a job's models loaded, built again where the kind of weights changed.

        Raises:
            OutOfMemory: the weights cannot be used on this machine at all.
            RequestError: a picture of this size and number of steps is hopeless here.
        """
        self._drop_what_changed(job.chosen)
        yield from self._build(job.request.mode, job.chosen)
        assert self.pipeline is not None  # they were built just now
        assert self.device is not None
        assert self.plan is not None
        kind, size = job.chosen.kind, job.prepared.size
        work = MODES[job.request.mode].work(job.request, kind, size, self.plan)
        expected = self.refuse_hopeless(work, self.device, self.plan)
        if expected.seconds >= ESTIMATE_SHOWN:
            yield Stage("estimating", expected.text)
        yield from self.pipeline.load(job.chosen, job.request.model)
        return self.pipeline

    def _drop_what_changed(self, chosen: inventory.Chosen) -> None:
        """Drop the pipeline where a file that it was loaded from has changed; mapped weights change with theirs."""
        if self.pipeline is None:
            self._read.clear()
        now = {}
        for path in (path for files in chosen.files.values() for path in flat(files)):
            with contextlib.suppress(OSError):  # loading it says why
                now[path] = mark(path)
        changed = [path.name for path, seen in now.items() if self._read.get(path, seen) != seen]
        if changed:
            log.warning("loading again, for these files have changed: %s", ", ".join(changed))
            self.drop()
        self._read |= now

    def refuse_hopeless(self, work: estimate.Work, on: Device, plan: MemoryPlan) -> estimate.Estimate:
        """Return what a request will take.

        Raises:
            RequestError: it is hopeless here.
        """
        estimate.check(work, plan, on.dtype, self.forecast.speed(work, on))
        expected = self.forecast.estimate(work, on, plan)
        log.info("estimate: %s (%s speed)", expected.text, expected.source)
        return expected

    def _build(self, mode: str, chosen: inventory.Chosen) -> Generator[Event, None, None]:
        """Plan the memory and build the pipeline, unless they are there for such weights."""
        # A plan that was made without the ControlNet may not leave room for it.
        planned = self.plan is not None and ("controlnet" in self.plan.parts or "controlnet" not in chosen.files)
        if self.pipeline is not None and self.kind == chosen.kind and planned:
            return
        if not lazy_imports.is_loaded(PROGRAM):
            yield Stage("starting")  # torch and diffsynth take seconds to import
        self.drop()
        environment.prepare_environment(os.environ)
        lazy_imports.load(PROGRAM)
        import torch

        from diffusion.pipeline import Pipeline

        device, plan = self._planned(mode, chosen.kind)
        log.info("%s; %s", device.reason, "; ".join(map(str, plan.reasons)))
        if not plan.fits:
            advice = Message(
                "mini", "Weights mini draws with the miniature; --memory GB counts with more than is free."
            )
            if environment.on_space():
                advice = Message("hardware", "Its owner can choose larger hardware for this Space.")
            text = "these weights do not fit this machine: {plan}. {advice}"
            raise OutOfMemory(text, plan=plan.reasons, advice=advice)
        self.device, self.plan, self.kind = device, plan, chosen.kind
        self.pipeline = Pipeline(device.kind, getattr(torch, device.dtype), plan, emulated=self.emulated)

    def machine(self, mode: str, kind: WeightsKind) -> tuple[Device, MemoryPlan]:
        """Return the device and the plan of its memory; imports torch.

        Where models were loaded by a plan, it is that one: what they take is not free any more.
        """
        if self.device is not None and self.plan is not None and self.kind == kind:
            return self.device, self.plan
        return self._planned(mode, kind)

    def _planned(self, mode: str, kind: WeightsKind) -> tuple[Device, MemoryPlan]:
        """Look at this machine as it is now; imports torch."""
        environment.prepare_environment(os.environ)
        device = self._look(kind)
        plan = plan_for(device, mode, kind, memory_gb=self.settings.memory_gb, tighter=self._tighter)
        return device, plan

    def _look(self, kind: WeightsKind) -> Device:
        """Return the device to compute on; imports torch."""
        return choose_device(self.settings.device, kind, self.settings.dtype)

    def drop(self) -> None:
        """Give the pipeline's memory back."""
        self.pipeline = self.kind = self.plan = None
        gc.collect()  # modules hold cycles

    def _may_try_again(self, error: Exception) -> bool:
        """Say whether less memory could help after an error."""
        return is_out_of_memory(error) and self.plan is not None and not self.plan.tightest

    def _translated(self, error: Exception) -> StudioError:
        """Return a foreign exception as one of ours, by its type; what it left half-done is dropped."""
        self.drop()
        if is_out_of_memory(error):
            log.warning("out of memory: %s", error)
            if environment.on_space():
                return SpaceOutOfMemory()
            return OutOfMemory(
                "the memory did not suffice, also with the tightest plan; choose a smaller width and height, draw "
                "without a LoRA, or close other programs that use the memory"
            )
        log.exception("internal error")
        return InternalError(type(error).__name__, str(error))
