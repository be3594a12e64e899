"""ZeroGPU's rules: its decorator (elsewhere nothing), how many seconds to ask for, and what its errors mean.

What draws there is `engine.worker_zerogpu`.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

from core.errors import GpuAborted, GpuBusy, GpuQuota, InternalError, StudioError
from core.messages import Message
from diffusion.device import Device
from diffusion.memory import HEADROOM, MemoryPlan
from engine.estimate import Speed, Work

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

ACTIVE = os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")  # as spaces.config reads it

# What a Space is asked for, before the card's factor: less gives no better place in its queue; more most visitors do
# not have.
LEAST_SECONDS, MOST_SECONDS = 60, 180

# --- what the platform lends: the Hub's page on ZeroGPU as of 2026-05, and `spaces` 0.51.3 of PyPI as of 2026-11 ---


@dataclass(frozen=True)
class Card:
    """A GPU as ZeroGPU counts it, lent in the size "large": half of an RTX Pro 6000 Blackwell.

    Attributes:
        factor: seconds that a visitor gets, and that their quota is charged, for each second that is asked for.
        packed_at_most: bytes of packed models above which whole cards are lent to every visitor, at twice the quota;
            None where there are no two sizes.
    """

    factor: float
    packed_at_most: int | None


USUAL_CARD = Card(factor=1.5, packed_at_most=45_097_156_608)
LENT_BYTES = 48_000_000_000  # of a card of 96 GB
MINUTES_A_DAY: Mapping[str, int] = {"none": 2, "free": 5, "pro": 40}  # of a visitor without an account, and with one

# What an estimate is made of, until it is measured there: a third of the 250 TFLOP/s in bf16 that follow for half of
# that card from its data sheet (4 PFLOP/s in sparse fp4 for a whole one). The slice of an H200 that was lent
# before, with a factor of 1, was taken for 130.
FLOP_PER_SECOND = 85e12
START_SECONDS = 20.0  # forking, and bringing up to 40 GB from disk to the GPU
LORA_SECONDS = 5.0


@cache
def card() -> Card:
    """Return the card that is lent here: as the Space's own package says it, else the usual one."""
    if ACTIVE:
        try:
            from spaces.zero.config import get_config

            told = get_config()
            return Card(told["duration_factor"], told["xlarge_threshold"])
        except (ImportError, KeyError) as error:  # another release
            log.warning("the package spaces does not tell its card's figures (%s)", error)
    return USUAL_CARD


def lent(device: Device) -> Device:
    """Return a device with the memory that is lent of it, and no more than may be packed.

    The page's process is shown the whole card. Of what a plan may count with, the headroom is never packed.
    """
    if device.kind != "cuda":
        return device
    limit = card().packed_at_most
    most = LENT_BYTES if limit is None else min(LENT_BYTES, limit + HEADROOM[device.dtype])
    total, free = (min(size or most, most) for size in (device.total_bytes, device.free_bytes))
    return replace(device, total_bytes=total, free_bytes=free)


def lend(**options: Any) -> Callable[[F], F]:
    """Return `spaces.GPU` with these options, which the Space provides; elsewhere the identity."""
    if not ACTIVE:
        return lambda task: task
    import spaces  # before anything initialises CUDA: it refuses to start afterwards

    lent: Callable[[F], F] = spaces.GPU(**options)
    return lent


# Its speed for products and convolutions alike; the weights are all there.
SPEED = Speed(FLOP_PER_SECOND, FLOP_PER_SECOND, fetched=math.inf, text=FLOP_PER_SECOND, vae=FLOP_PER_SECOND)


def estimate(work: Work, plan: MemoryPlan, lora: bool = False) -> float:
    """Return the seconds that work will hold the GPU under a memory plan, with a LoRA or without one."""
    return START_SECONDS + SPEED.seconds(work, plan) + (LORA_SECONDS if lora else 0.0)


def seconds_asked(expected: float, multiplier: float = 1.0, at_most: int | None = None) -> int:
    """Return how many seconds of the GPU to ask for: 60 to 180, less only where that is all that the quota covers.

    Args:
        expected: seconds that the work will take, as `estimate`.
        multiplier: how many times these to ask for.
        at_most: seconds that may be asked for with what the visitor's quota still covers, where known.
    """
    wanted = max(expected / card().factor, LEAST_SECONDS)  # first, so that a second try always asks for more
    clamped = min(math.ceil(multiplier * wanted), MOST_SECONDS)
    return clamped if at_most is None else min(clamped, at_most)


def granted(asked: int) -> int:
    """Return the seconds that a visitor gets, and is charged, where so many are asked for, as `spaces` counts them."""
    return round(asked * card().factor)


def has_visitor() -> bool:
    """Whether this is called for a visitor of the page or of a named endpoint: the quota is theirs."""
    from gradio.context import LocalContext

    return LocalContext.request.get(None) is not None


# --- what the Space says, in our words: nothing else looks at its titles and messages ------------------------------

# spaces.zero.client and spaces.zero.wrappers (0.51.3). The numbers in a message, and all that are told to a visitor,
# are those of the quota: seconds asked for, times the card's factor.
_LEFT = re.compile(r"\((\d+)s requested vs\. (-?\d+)s left\)")
_WAIT = re.compile(r"Try again in ((?:\d+ days?, )?\d+:\d\d:\d\d)")
_ACCOUNT = re.compile(r"exceeded your (?:(free|Pro) )?ZeroGPU quota")  # neither: without an account
_SMALLER = Message("smaller", "fewer steps or a smaller picture need less")


_NONE_FREE = "no GPU was free within a minute; try again, signed in to Hugging Face for a better place"


def refusal_of(error: Exception, asked: int) -> StudioError:
    """Translate an error of the Space, told apart by its title, after `asked` seconds were asked for."""
    message, needed = str(getattr(error, "message", error)), granted(asked)
    match getattr(error, "title", ""):
        case "ZeroGPU quota exceeded" if message.startswith("No GPU was available"):  # to one without a token
            return GpuBusy(_NONE_FREE)
        case "ZeroGPU quota exceeded":
            return _over_quota(message, asked)
        case "ZeroGPU pending credits exceeded":
            return GpuQuota(
                "your GPU quota is set aside for pictures that are still being made; wait until they are done"
            )
        case "ZeroGPU illegal duration":
            return GpuQuota(
                "this request counts as {needed} s of a GPU, more than you get at once; {smaller}, and an account "
                "gives more: sign in to Hugging Face ({none} minutes a day without an account, {free} with a free one, "
                "{pro} with PRO)",
                needed=needed,
                smaller=_SMALLER,
                **MINUTES_A_DAY,
            )
        case "ZeroGPU queue timeout":
            return GpuBusy(_NONE_FREE)
        case "ZeroGPU client error" if "token" in message.lower():
            return GpuBusy("this page was open for too long for the Space to know you still; reload it and try again")
        case "ZeroGPU client error":
            return GpuBusy("no GPU is free on Hugging Face at the moment; try again in a few minutes")
        case "ZeroGPU worker error" if message == "GPU task aborted":
            text = "the Space took its GPU back after {asked} s, {smaller}"
            if asked >= MOST_SECONDS:
                text = "the Space took its GPU back after {asked} s, the most that a request gets; {smaller}"
            return GpuAborted(text, asked=needed, smaller=_SMALLER)
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
        needed, left = int(numbers[1]), max(int(numbers[2]), 0)
        values: dict[str, Any] = {"left": left, "needed": needed, "later": later, "smaller": _SMALLER, **MINUTES_A_DAY}
        text = (
            "your GPU quota has {left} s left and this request counts as {needed} s; {later}, or ask for less: "
            "{smaller}"
        )
        account = _ACCOUNT.search(message)
        if account and not account[1]:
            text = (
                "without an account your GPU quota has {left} s left and this request counts as {needed} s; sign in to "
                "Hugging Face for {free} minutes a day in place of {none}, {later}, or ask for less: {smaller}"
            )
            if needed > 60 * MINUTES_A_DAY["none"]:
                text = (
                    "this request counts as {needed} s of a GPU, more than a day has without an account ({none} "
                    "minutes); sign in to Hugging Face for {free} minutes a day, or ask for less: {smaller}"
                )
        # For another try: what may be asked for with what is left.
        return GpuQuota(text, fits=asked * left // max(needed, 1), **values)
    if "runs limit" in message:
        text = (
            "you have used up the number of pictures that your GPU quota allows for now; {later}, or sign in to "
            "Hugging Face for more, where you are not"
        )
        return GpuQuota(text, later=later)
    return GpuQuota(
        "visitors who are not signed in have used up this Space's GPU quota; sign in to Hugging Face and open the "
        "Space there (a program gives a token), or try again later"
    )
