"""ZeroGPU's rules: its decorator (elsewhere nothing), how many seconds to ask for, and what its errors mean.

What draws there is `engine.worker_zerogpu`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

from core.errors import GpuAborted, GpuBusy, GpuQuota, InternalError, StudioError
from core.messages import Message
from diffusion.memory import MemoryPlan
from engine.estimate import Speed, Work

F = TypeVar("F", bound=Callable[..., Any])

ACTIVE = os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")  # as spaces.config reads it

LEAST_SECONDS, MOST_SECONDS = 60, 180  # less gives no better place in the Space's queue; more most visitors do not have
SECOND_TRY = 2.0

# What an estimate is made of, until it is measured there. A visitor's GPU is 60 of an H200's 132 multiprocessors.
FLOP_PER_SECOND = 130e12
START_SECONDS = 20.0  # forking, and bringing up to 40 GB from disk to the GPU
LORA_SECONDS = 5.0


def lend(**options: Any) -> Callable[[F], F]:
    """Return `spaces.GPU` with these options, which the Space provides; elsewhere the identity."""
    if not ACTIVE:
        return lambda task: task
    import spaces  # before anything initialises CUDA: it refuses to start afterwards

    lent: Callable[[F], F] = spaces.GPU(**options)
    return lent


# The slice's speed, for products and convolutions alike; its weights are all there.
SPEED = Speed(FLOP_PER_SECOND, FLOP_PER_SECOND, fetched=math.inf, text=FLOP_PER_SECOND, vae=FLOP_PER_SECOND)


def estimate(work: Work, plan: MemoryPlan, lora: bool = False) -> float:
    """Return the seconds that work will hold the GPU under a memory plan, with a LoRA or without one."""
    return START_SECONDS + SPEED.seconds(work, plan) + (LORA_SECONDS if lora else 0.0)


def seconds_asked(expected: float, multiplier: float = 1.0, at_most: int | None = None) -> int:
    """Return how many seconds of the GPU to ask for: after these the Space takes it back.

    Args:
        expected: seconds that the work will take, as `estimate`.
        multiplier: how many times these to ask for.
        at_most: seconds that the visitor's quota still covers, where known.
    """
    wanted = max(expected, LEAST_SECONDS)  # first, so that a second try always asks for more
    clamped = min(math.ceil(multiplier * wanted), MOST_SECONDS)
    return clamped if at_most is None else min(clamped, at_most)


def has_visitor() -> bool:
    """Whether this is called for a visitor of the page or of a named endpoint: the quota is theirs."""
    from gradio.context import LocalContext

    return LocalContext.request.get(None) is not None


# --- what the Space says, in our words: nothing else looks at its titles and messages ------------------------------

# spaces.zero.client and spaces.zero.wrappers (0.51.3). The numbers in a message are of its own making: seconds times
# a factor of the kind of GPU.
_LEFT = re.compile(r"\((\d+)s requested vs\. (-?\d+)s left\)")
_WAIT = re.compile(r"Try again in ((?:\d+ days?, )?\d+:\d\d:\d\d)")
_SMALLER = Message("smaller", "fewer steps or a smaller picture need less")


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
                "this request asks for {asked} s of a GPU, more than this Space gives you at once; {smaller}, and a "
                "Hugging Face PRO account may ask for more",
                asked=asked,
                smaller=_SMALLER,
            )
        case "ZeroGPU queue timeout":
            return GpuBusy("no GPU was free within a minute; try again, signed in to Hugging Face for a better place")
        case "ZeroGPU client error" if "token" in message.lower():
            return GpuBusy("this page was open for too long for the Space to know you still; reload it and try again")
        case "ZeroGPU client error":
            return GpuBusy("no GPU is free on Hugging Face at the moment; try again in a few minutes")
        case "ZeroGPU worker error" if message == "GPU task aborted":
            text = "the Space took its GPU back after {asked} s, {smaller}"
            if asked >= MOST_SECONDS:
                text = "the Space took its GPU back after {asked} s, the most that a request gets; {smaller}"
            return GpuAborted(text, asked=asked, smaller=_SMALLER)
        case "ZeroGPU worker error":
            return InternalError(message, "in the process with the GPU")
        case title:  # a later release of `spaces` may know more
            return GpuBusy("the Space gave no GPU: {message}", message=message or title)


def _over_quota(message: str, asked: int) -> GpuQuota:
    wait = _WAIT.search(message)
    later = Message("later", "try again later")
    if wait:
        later = Message("later", "try again in {time} (hours:minutes:seconds)", time=wait[1])
    if numbers := _LEFT.search(message):
        requested, left = int(numbers[1]), max(int(numbers[2]), 0)
        fits = asked * left // max(requested, 1)
        return GpuQuota(
            "your GPU quota has {fits} s left and this request asks for {asked} s; {later}, or ask for less: {smaller}",
            fits=fits,
            asked=asked,
            later=later,
            smaller=_SMALLER,
        )
    if "runs limit" in message:
        text = "you have used up the number of pictures that your GPU quota allows for now; {later}"
        return GpuQuota(text, later=later)
    return GpuQuota(
        "visitors who are not signed in have used up this Space's GPU quota; sign in to Hugging Face and open the "
        "Space there (a program gives a token), or try again later"
    )
