"""Draws on ZeroGPU: a Space that lends a GPU to one request at a time, in a process forked for it.

The parent process holds the queue, the page, and models that wait packed on disk. The GPU belongs to a fork of it, so
what goes there and comes back is pickled, and an exception comes back as the name of its class alone: failures are
events. Closing the generator is the Space's own sign to stop, and so is ours to cancel.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

from core.errors import GpuAborted, GpuNoVisitor, GpuQuota, RequestError, StudioError, WeightsMissing
from core.events import Event, Failure, Retry
from core.messages import Message
from core.request import MODELS, ControlNet, Model, Resolved, TextToImage, Upscale, WeightsChoice
from core.sizes import IMAGE_SIZES, WeightsKind
from diffusion.device import Device
from diffusion.measure import Dtype
from diffusion.memory import TILED_AT_LEAST, MemoryPlan
from engine import zerogpu
from engine.estimate import Forecast, Work, peak_bytes, whole_vae_pixels
from engine.mode import Drawing, Drawn, Job, Prepared
from engine.modes import MODES
from engine.worker import LocalWorker, Settings
from hub import inventory

log = logging.getLogger(__name__)

SECOND_TRY = 2.0  # times the seconds of the first


@dataclass(frozen=True)
class Task:
    """What is sent to the GPU; picklable.

    Attributes:
        job: what is drawn.
        expected: seconds that it will hold the GPU.
        multiplier: how many times these to ask for.
        at_most: seconds that may be asked for with what the visitor's quota still covers, where known.
    """

    job: Job[Resolved]
    expected: float
    multiplier: float = 1.0
    at_most: int | None = None

    @property
    def seconds(self) -> int:
        """How many seconds of the GPU to ask for."""
        return zerogpu.seconds_asked(self.expected, self.multiplier, self.at_most)


def for_every_request(plan: MemoryPlan, kind: WeightsKind, dtype: Dtype) -> MemoryPlan:
    """Return a plan in which the largest request fits, the copies for its LoRA included.

    Elsewhere a request whose memory did not suffice is tried again with less; packed models stay as they are.
    """
    if kind == "mini":
        return plan
    side = IMAGE_SIZES[kind].maximum
    largest = Work(kind, 1, side, side, controlled="controlnet" in plan.parts)
    copies = max(0, min(plan.lora_copies, plan.room - peak_bytes(largest, plan, dtype)))
    whole = max(TILED_AT_LEAST, whole_vae_pixels(plan, copies))
    return replace(plan, lora_copies=copies, tiled_vae_above=min(plan.tiled_vae_above, whole))


class PackedWorker(LocalWorker):
    """Draws with models that were loaded before the launch, all of one kind of weights, and are never loaded again.

    Loading packs what lies on "cuda", and may delete files that were mapped: nothing is looked for on disk afterwards.
    """

    emulated = zerogpu.ACTIVE

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._chosen: dict[tuple[str, str], inventory.Chosen] = {}
        self._fingerprints: dict[str, str] = {}  # by part
        self.forecast = Forecast(zerogpu.SPEED)

    def pack(self) -> None:
        """Load every model that is on this machine, in the calling thread.

        Call it in the main thread, before `Blocks.launch`: ZeroGPU emulates CUDA in that thread alone.

        Raises:
            StudioError: there is no model to draw with, or the memory does not suffice.
        """
        # The ControlNet first: its memory plan has room for all.
        modes = [(ControlNet.mode, ControlNet.model), *((TextToImage.mode, model) for model in reversed(list(MODELS)))]
        for mode, model in (*modes, (Upscale.mode, Upscale.model)):
            try:
                chosen = super().weights(mode, model, "auto")
            except WeightsMissing as error:
                log.warning("not on this Space: %s", error)
                continue
            if self._chosen and chosen.kind != self.kind:
                continue  # one pipeline has one kind of weights
            for event in self._build(mode, chosen):
                log.info("%s", event)
            assert self.pipeline is not None  # it was built just now
            assert self.plan is not None
            packed = {model for _, model in self._chosen}
            if packed and model not in packed and self.plan.other_transformer != "stays":
                log.warning("not on this Space, whose memory has no room for it: %s", model)
                continue
            for event in self.pipeline.load(chosen, model):
                log.info("%s", event)
            self._chosen[mode, model] = chosen
            self._fingerprints |= super().fingerprints(chosen)  # the files are still there
        if not self._chosen:
            raise WeightsMissing("this Space has no weights to draw with: see the log")

    def weights(self, mode: str, model: Model, asked: WeightsChoice, checkpoint: str = "") -> inventory.Chosen:
        """Return what a mode draws with.

        Raises:
            RequestError: another kind is asked for, or a checkpoint.
            WeightsMissing: this mode's were not there.
        """
        if checkpoint:
            allowed = Message("packed_alone", "none on this Space, which draws with the weights that it has loaded")
            raise RequestError("checkpoint", checkpoint, allowed)
        if asked not in ("auto", self.kind):
            raise RequestError("weights", asked, Message("packed", "auto or {kind} on this Space", kind=self.kind))
        if (mode, model) not in self._chosen:
            text = "this Space has no weights for the mode {mode} with the model {model}"
            raise WeightsMissing(text, mode=mode, model=model)
        return self._chosen[mode, model]

    def fingerprints(self, chosen: inventory.Chosen) -> Mapping[str, str]:
        """Return the identity of each part's files, as it was while they were there."""
        return {part: self._fingerprints[part] for part in chosen.files}

    def machine(self, mode: str, kind: WeightsKind) -> tuple[Device, MemoryPlan]:
        """Return the device and the plan that models were loaded by: the page's process has no GPU to look at."""
        assert self.device is not None  # `pack` came first
        assert self.plan is not None
        return self.device, self.plan

    def _look(self, kind: WeightsKind) -> Device:
        return zerogpu.lent(super()._look(kind))

    def _planned(self, mode: str, kind: WeightsKind) -> tuple[Device, MemoryPlan]:
        device, plan = super()._planned(mode, kind)
        return device, for_every_request(plan, kind, device.dtype)

    def drop(self) -> None:
        """Keep the models, which could not be loaded again, once they are packed."""
        if not self._chosen:
            super().drop()

    def _may_try_again(self, error: Exception) -> bool:
        return False


class ForkWorker(Protocol):
    """What draws in the forks."""

    def draw(self, request: Resolved, chosen: inventory.Chosen, prepared: Prepared | None = None) -> Drawing:
        """Carry out a request, as `LocalWorker.draw`."""
        ...


_in_forks: ForkWorker | None = None  # at module level, where forks find it


def share(worker: ForkWorker) -> None:
    """Let forks of this process draw with a worker."""
    global _in_forks
    _in_forks = worker


class ZeroGpuWorker:
    """Does in this process what needs no GPU, refusing what is wrong, and the rest in a fork that has one.

    Raises:
        StudioError: there is no model to draw with, or the memory does not suffice.
    """

    def __init__(self, settings: Settings) -> None:
        self.packed = PackedWorker(settings)
        self.packed.pack()
        os.register_at_fork(after_in_child=self.packed.controls.unlock)
        share(self.packed)
        self.weights = self.packed.weights
        self.memory = self.packed.memory
        self.control_image = self.packed.control_image
        self.foresee = self.packed.foresee
        self.outlook = self.packed.outlook

    def warm_up(self) -> None:
        """Do nothing: everything was loaded before the page was there."""

    def draw(self, request: Resolved, chosen: inventory.Chosen) -> Drawing:
        """Carry out a request on a GPU lent for it, and once more with more time where it was taken back too early.

        Raises:
            GpuRefused: the Space gives no GPU, or took it back.
            StudioError: as `Worker.draw`.
        """
        mode = MODES[request.mode]
        prepared = yield from mode.prepare(request, chosen.kind, self.packed.controls)
        device, plan = self.packed.machine(request.mode, chosen.kind)
        work = mode.work(request, chosen.kind, prepared.size, plan)
        self.packed.refuse_hopeless(work, device, plan)
        expected = zerogpu.estimate(work, plan, lora=bool(request.lora_name))
        return (yield from carry_out(Task(Job(request, chosen, prepared), expected)))


def carry_out(task: Task) -> Drawing:
    """Carry out a task on a GPU lent for it, and once more with more time where it was taken back too early.

    Raises:
        GpuRefused: the Space gives no GPU, or took it back.
        StudioError: the task itself failed.
    """
    if not zerogpu.has_visitor():
        raise GpuNoVisitor()
    notes: tuple[Message, ...] = ()
    while True:
        drawn = yield from _lent(task)
        if isinstance(drawn, Drawn):
            return replace(drawn, notes=(*drawn.notes, *notes))
        again = another_try(task, drawn)
        if again is None:
            raise drawn
        log.info("%s; trying again with %d s instead of %d", drawn, again.seconds, task.seconds)
        if again.multiplier != task.multiplier:
            text = "The Space took its GPU back after {asked} s; trying once more with {seconds} s."
            asked, seconds = (zerogpu.granted(tried.seconds) for tried in (task, again))
            notes = (Message("gpu_retry", text, asked=asked, seconds=seconds),)
            yield Retry(*notes)
        task = again


def _lent(task: Task) -> Generator[Event, None, Drawn | StudioError]:
    """Carry out a task on a GPU; return what came of it, or the Space's refusal.

    Raises:
        StudioError: the task itself failed.
    """
    from gradio.exceptions import Error

    try:
        with closing(on_gpu(task)) as events:
            for event in events:
                if isinstance(event, Drawn):
                    return event
                if isinstance(event, Failure):
                    raise event.error()
                yield event
    except Error as error:
        refusal = zerogpu.refusal_of(error, task.seconds)
        refusal.__cause__ = error
        return refusal
    raise AssertionError("a task ends with a picture or a failure")


@zerogpu.lend(duration=lambda task: task.seconds, size="large")
def on_gpu(task: Task) -> Generator[Event | Drawn, None, None]:
    # At module level and of one argument: the Space pickles what it sends, and a method would bring its models along.
    assert _in_forks is not None  # `share` came first
    try:
        yield (yield from _in_forks.draw(task.job.request, task.job.chosen, task.job.prepared))
    except StudioError as error:  # as an event: its class alone would come back
        yield Failure.of(error)


def another_try(task: Task, refusal: StudioError) -> Task | None:
    """Return what to try after a refusal: at most once more time, and at most once what the quota still covers."""
    if isinstance(refusal, GpuAborted) and task.multiplier < SECOND_TRY:
        again = replace(task, multiplier=SECOND_TRY)
        return again if again.seconds > task.seconds else None  # not at the limit, nor at the quota's end
    left = refusal.values.get("fits") if isinstance(refusal, GpuQuota) else None
    if left is None or task.at_most is not None or left >= task.seconds:
        return None
    if task.multiplier > 1 and left <= replace(task, multiplier=1.0).seconds:
        return None  # so much did not suffice before
    return replace(task, at_most=left) if task.expected <= zerogpu.granted(left) else None
