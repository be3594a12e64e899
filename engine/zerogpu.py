"""ZeroGPU: a Space that lends a GPU to one request at a time, in a process forked for it.

Holds what is particular to it: the decorator (elsewhere nothing), how many seconds to ask for, what its errors mean,
and one second try with more time. What carries a request out there is handed in with `use`.

The parent process holds the queue, the page, and models that wait packed on disk. The GPU belongs to a fork of it, so
what goes there and comes back is pickled, and an exception comes back as the name of its class alone: failures are
events. Closing the generator is the Space's own sign to stop, and so is ours to cancel.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from core.errors import (
    GpuAborted,
    GpuBusy,
    GpuNoVisitor,
    GpuQuota,
    InternalError,
    RequestError,
    StudioError,
    WeightsMissing,
)
from core.events import Event, Result, Retry
from core.messages import Message
from core.request import Request, WeightsChoice
from core.sizes import WeightsKind
from engine.estimate import Work
from hub import checkpoint, inventory

log = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Any])

ACTIVE = os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")  # as spaces.config reads it

LEAST_SECONDS, MOST_SECONDS = 60, 180  # less gives no better place in the Space's queue; more most visitors do not have
SECOND_TRY = 2.0

# What an estimate is made of, until it is measured there. A visitor's GPU is 60 of an H200's 132 multiprocessors.
FLOP_PER_SECOND = 130e12
START_SECONDS = 20.0  # forking, and bringing up to 40 GB from disk to the GPU
LORA_SECONDS = 5.0


def _gpu(**options: Any) -> Callable[[F], F]:
    """Return `spaces.GPU` with these options, which the Space provides; elsewhere the identity."""
    if not ACTIVE:
        return lambda task: task
    import spaces  # before anything initialises CUDA: it refuses to start afterwards

    lent: Callable[[F], F] = spaces.GPU(**options)
    return lent


@dataclass(frozen=True)
class Task:
    """What is sent to the GPU; picklable.

    Attributes:
        request: resolved.
        size: width and height of the picture that will come of it.
        prepared: what the parent has made of the request's files already, for `use`'s `work`.
        multiplier: how many times the estimate to ask for.
        at_most: seconds that the visitor's quota still covers, where known.
    """

    request: Request
    size: tuple[int, int]
    prepared: Any = None
    multiplier: float = 1.0
    at_most: int | None = None


def estimate(request: Request, size: tuple[int, int]) -> float:
    """Return the seconds that a request will hold the GPU: by mode, model, steps, area and LoRA."""
    seconds = START_SECONDS + Work.of(request, "full", size).flops / FLOP_PER_SECOND
    return seconds + (LORA_SECONDS if getattr(request, "lora", "") else 0.0)


def seconds_asked(task: Task) -> int:
    """Return how many seconds of the GPU to ask for: after these the Space takes it back."""
    wanted = max(estimate(task.request, task.size), LEAST_SECONDS)  # first, so that a second try always asks for more
    clamped = min(math.ceil(task.multiplier * wanted), MOST_SECONDS)
    return clamped if task.at_most is None else min(clamped, task.at_most)


_work: Callable[[Task], Iterator[Event]] | None = None


def use(work: Callable[[Task], Iterator[Event]]) -> None:
    """Say how a task is carried out, in the fork. `work` yields events and raises nothing."""
    global _work
    _work = work


@_gpu(duration=seconds_asked)
def _on_gpu(task: Task) -> Generator[Event, None, None]:
    # At module level and of one argument: the Space pickles what it sends, and a method would bring its models along.
    assert _work is not None  # `use` came first
    yield from _work(task)


def carry_out(task: Task) -> Generator[Event, None, None]:
    """Carry out a task on a GPU lent for it, and once more with more time where it was taken back too early.

    Yields:
        What `work` yields; before a second try a `Retry`.

    Raises:
        GpuRefused: the Space gives no GPU, or took it back.
        InternalError: the process with the GPU failed.
    """
    from gradio.exceptions import Error

    if not _has_visitor():
        raise GpuNoVisitor()
    notes: tuple[Message, ...] = ()
    while True:
        try:
            with closing(_on_gpu(task)) as events:
                for event in events:
                    yield _noted(event, notes) if isinstance(event, Result) else event
            return
        except Error as error:
            asked = seconds_asked(task)
            refusal = refusal_of(error, asked)
            again = _another_try(task, refusal)
            if again is None:
                raise refusal from error
        log.info("%s; trying again with %d s instead of %d", refusal, seconds_asked(again), asked)
        if again.multiplier != task.multiplier:
            text = "The Space took its GPU back after {asked} s; trying once more with {seconds} s."
            notes = (Message("gpu_retry", text, asked=asked, seconds=seconds_asked(again)),)
            yield Retry(*notes)
        task = again


def _noted(result: Result, notes: tuple[Message, ...]) -> Result:
    """Add notes to a result and to the parameters that come with it."""
    said = [*result.sidecar.get("notes", ()), *(str(note) for note in notes)]
    return replace(result, notes=(*result.notes, *notes), sidecar={**result.sidecar, "notes": said})


def _another_try(task: Task, refusal: StudioError) -> Task | None:
    """Return what to try after a refusal: at most once more time, and at most once what the quota still covers."""
    asked = seconds_asked(task)
    if isinstance(refusal, GpuAborted) and task.multiplier < SECOND_TRY:
        again = replace(task, multiplier=SECOND_TRY)
        return again if seconds_asked(again) > asked else None  # not at the limit, nor at the quota's end
    left = refusal.values.get("fits") if isinstance(refusal, GpuQuota) else None
    if left is None or task.at_most is not None or left >= asked:
        return None
    return replace(task, at_most=left) if estimate(task.request, task.size) <= left else None


def _has_visitor() -> bool:
    """Whether this is called for a visitor of the page or of a named endpoint: the quota is theirs."""
    from gradio.context import LocalContext

    return LocalContext.request.get(None) is not None


# --- what the Space says, in our words: nothing else looks at its titles and messages ------------------------------

# spaces.zero.client and spaces.zero.wrappers (0.51.3). The numbers in a message are of its own making: seconds times
# a factor of the kind of GPU.
_LEFT = re.compile(r"\((\d+)s requested vs\. (-?\d+)s left\)")
_WAIT = re.compile(r"Try again in ((?:\d+ days?, )?\d+:\d\d:\d\d)")
_SMALLER = "fewer steps or a smaller picture need less"


def refusal_of(error: Exception, asked: int) -> StudioError:
    """Translate an error of the Space, told apart by its title, after `asked` seconds were asked for."""
    message = str(getattr(error, "message", error))
    match getattr(error, "title", ""):
        case "ZeroGPU quota exceeded":
            return _over_quota(message, asked)
        case "ZeroGPU pending credits exceeded":
            return GpuQuota(
                "your GPU quota is set aside for pictures that are still being made; wait until they are done"
            )
        case "ZeroGPU illegal duration":
            return GpuQuota(
                f"this request asks for {asked} s of a GPU, more than this Space gives you at once; {_SMALLER}, and a "
                "Hugging Face PRO account may ask for more"
            )
        case "ZeroGPU queue timeout":
            return GpuBusy("no GPU was free within a minute; try again, signed in to Hugging Face for a better place")
        case "ZeroGPU client error" if "token" in message.lower():
            return GpuBusy("this page was open for too long for the Space to know you still; reload it and try again")
        case "ZeroGPU client error":
            return GpuBusy("no GPU is free on Hugging Face at the moment; try again in a few minutes")
        case "ZeroGPU worker error" if message == "GPU task aborted":
            at_limit = "the most that a request gets; " if asked >= MOST_SECONDS else ""
            return GpuAborted(f"the Space took its GPU back after {asked} s, {at_limit}{_SMALLER}")
        case "ZeroGPU worker error":
            return InternalError(message, "in the process with the GPU")
        case title:  # a later release of `spaces` may know more
            return GpuBusy(f"the Space gave no GPU: {message or title}")


def _over_quota(message: str, asked: int) -> GpuQuota:
    wait = _WAIT.search(message)
    later = f"try again in {wait[1]} (hours:minutes:seconds)" if wait else "try again later"
    if numbers := _LEFT.search(message):
        requested, left = int(numbers[1]), max(int(numbers[2]), 0)
        fits = asked * left // max(requested, 1)
        return GpuQuota(
            f"your GPU quota has {fits} s left and this request asks for {asked} s; {later}, or ask for less: "
            f"{_SMALLER}",
            fits=fits,
        )
    if "runs limit" in message:
        return GpuQuota(f"you have used up the number of pictures that your GPU quota allows for now; {later}")
    return GpuQuota(
        "visitors who are not signed in have used up this Space's GPU quota; sign in to Hugging Face and open the "
        "Space there (a program gives a token), or try again later"
    )


class Packed:
    """The weights that were loaded before the launch, all of one kind; false while there are none."""

    def __init__(self) -> None:
        self._chosen: dict[tuple[str, str], inventory.Chosen] = {}
        self.fingerprints: dict[str, str] = {}  # by part

    def __bool__(self) -> bool:
        return bool(self._chosen)

    @property
    def kind(self) -> WeightsKind:
        """Of all of them."""
        return next(iter(self._chosen.values())).kind

    def add(self, mode: str, model: str, chosen: inventory.Chosen) -> None:
        """Note what a mode draws with; the files are still there."""
        self._chosen[mode, model] = chosen
        self.fingerprints |= {part: checkpoint.fingerprint(files) for part, files in chosen.files.items()}

    def of(self, mode: str, model: str, asked: WeightsChoice) -> inventory.Chosen:
        """Return what a mode draws with.

        Raises:
            RequestError: another kind is asked for.
            WeightsMissing: this mode's were not there.
        """
        if asked not in ("auto", self.kind):
            raise RequestError("weights", asked, f"auto or {self.kind} on this Space")
        if (mode, model) not in self._chosen:
            raise WeightsMissing(f"this Space has no weights for the mode {mode} with the model {model}")
        return self._chosen[mode, model]
