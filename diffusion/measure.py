"""How fast this machine's processor computes in fp32 and in bf16: measured once in a second, then remembered.

Which of the two is faster cannot be told from a processor's name: on two AVX2 cores matrix products ran at 152 GFLOP/s
in fp32 and 22 in bf16, on two cores with AMX at 280 and 950. So it is measured, and kept for each processor, version of
torch and number of threads. torch is imported when something is measured.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from core.errors import NotWritten
from core.messages import Message
from core.whole_file import write_whole

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Dtype = Literal["bfloat16", "float32"]
Part = Literal["transformer", "text_encoder", "vae"]  # the ControlNet goes with the transformer

BUDGET = 0.08  # seconds for each of the eight measurements
LONG_ENOUGH = 0.008  # seconds; a run that takes as long is timed well enough, and no larger one is tried
KEPT = 16  # processors, versions of torch and numbers of threads in the file

# What one denoising step of the real transformer consists of at 1024 x 1024, in operations: 30 layers on 4,192 tokens
# of 3,840 numbers, 52 TFLOP of products and 8 of attention.
USUAL_PROMPT = 32  # tokens of some ten words in the chat template
STEP_SHARES: Mapping[str, float] = {"products": 0.86, "attention": 0.14}
# fp32 is nearer to what other machines draw, so bf16 has to be faster by more than two measurements differ.
CLEARLY_FASTER = 1.2


@dataclass(frozen=True)
class Pair:
    """Operations a second in both dtypes, in GFLOP/s."""

    float32: float
    bfloat16: float

    @property
    def ratio(self) -> float:
        """How many times as fast bf16 is."""
        return self.bfloat16 / self.float32

    @property
    def message(self) -> Message:
        """Both figures, for people."""
        text = "{float32:.3g} GFLOP/s in fp32, {bfloat16:.3g} in bf16"
        return Message("speed", text, float32=self.float32, bfloat16=self.bfloat16)

    def __str__(self) -> str:
        return str(self.message)


@dataclass(frozen=True)
class Speeds:
    """What a processor does in a second, by the kinds of work that the models consist of."""

    products: Pair
    convolution: Pair
    attention: Pair
    text: Pair

    @property
    def step(self) -> Pair:
        """A denoising step, as STEP_SHARES mixes products and attention; 0 for a dtype that lacks one of them."""
        rates = []
        for dtype in ("float32", "bfloat16"):
            done = {work: getattr(getattr(self, work), dtype) for work in STEP_SHARES}
            rates.append(
                1 / sum(share / done[work] for work, share in STEP_SHARES.items()) if all(done.values()) else 0
            )
        return Pair(*rates)

    def of(self, part: Part) -> Pair:
        """Return the speed of the work that a part consists of, nearly all of it."""
        return {"transformer": self.step, "text_encoder": self.text, "vae": self.convolution}[part]

    def faster(self, part: Part) -> Dtype:
        """Return the dtype to compute a part in: bf16 where that is clearly faster."""
        return "bfloat16" if self.of(part).ratio >= CLEARLY_FASTER else "float32"


def speeds(file: Path | None = None) -> Speeds:
    """Return this machine's figures: those that are stored, else measured now and stored.

    A file that is damaged, or cannot be read or written, only means that they are measured once in each process.

    Args:
        file: where they are stored; `cache_file` where none is given.
    """
    with _one_at_a_time:
        this = key()
        file = file or cache_file()
        if (file, this) not in _of_this_process:
            stored = _stored(file) if file else {}
            if this not in stored:
                stored = dict(list(stored.items())[-(KEPT - 1) :]) | {this: asdict(measure())}
                if file:
                    _store(stored, file)
            _of_this_process[file, this] = _speeds(stored[this])
        return _of_this_process[file, this]


_one_at_a_time = threading.Lock()
_of_this_process: dict[tuple[Path | None, str], Speeds] = {}


def measure() -> Speeds:
    """Return this machine's figures, measured in about a second, also where one dtype is many times slower.

    One thread works, and its own processor time counts, so that other programs do not disturb it: among several threads
    the slowest would decide. The figures are for all of torch's threads.
    """
    import torch

    threads = torch.get_num_threads()
    found: list[Speeds] = []
    alone = threading.Event()

    def work() -> None:
        torch.get_num_threads()  # a thread that has not used torch takes the number of threads from what is set last
        torch.set_num_threads(1)
        alone.set()
        found.append(_measured(threads))

    worker = threading.Thread(target=work, name="measure", daemon=True)
    worker.start()
    alone.wait()
    torch.set_num_threads(threads)  # at once, for threads that begin meanwhile; the worker keeps its own number
    worker.join()
    return found[0]


def _measured(threads: int) -> Speeds:
    import torch

    def both(work: Work, *sizes: int) -> Pair:
        return Pair(*(threads * _rate(work, sizes, dtype) for dtype in (torch.float32, torch.bfloat16)))

    with torch.inference_mode():
        return Speeds(
            products=both(_product, 32, 128, 512),
            convolution=both(_convolution, 4, 16, 48),
            attention=both(_attention, 64, 192, 512),
            text=both(_text, USUAL_PROMPT),
        )


Work = Callable[[int, "torch.dtype"], tuple[Callable[[], object], float]]


# On Windows a thread's own time moves in steps of 16 ms.
_clock = time.perf_counter if sys.platform == "win32" else time.thread_time


def _rate(work: Work, sizes: tuple[int, ...], dtype: torch.dtype) -> float:
    """Return one thread's GFLOP/s at the largest size that is reached: a slow dtype stops at a small one.

    It is 0 for what a processor cannot do in a dtype at all.
    """
    ends = time.perf_counter() + BUDGET
    for size in sizes:
        run, operations = work(size, dtype)
        try:
            run()  # the first run also prepares
        except RuntimeError as error:
            log.info("%s in %s: %s", work.__name__, dtype, error)
            return 0.0
        least = _seconds(run)
        if least > LONG_ENOUGH:
            break
    while time.perf_counter() < ends:
        least = min(least, _seconds(run))
    return operations / least / 1e9


def _seconds(run: Callable[[], object]) -> float:
    begun = _clock()
    run()
    return max(_clock() - begun, 1e-7)


def _product(rows: int, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A linear layer of the transformer's width, on so many tokens."""
    import torch

    width, out = 3840, 1280
    tokens, weight = torch.ones(rows, width, dtype=dtype), torch.ones(out, width, dtype=dtype)
    return lambda: torch.nn.functional.linear(tokens, weight), 2.0 * rows * width * out


def _text(rows: int, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A feed-forward layer of the text encoder, on so many tokens: its weights, in bf16, are more than a cache holds.

    They are widened where fp32 is computed in, as those are that are held in bf16.
    """
    import torch

    width, hidden = 2560, 9728
    tokens, weight = torch.ones(rows, width, dtype=dtype), torch.ones(hidden, width, dtype=torch.bfloat16)
    return lambda: torch.nn.functional.linear(tokens, weight.to(dtype)), 2.0 * rows * width * hidden


def _convolution(side: int, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A 3 x 3 convolution of the VAE's narrowest layers, on a square of so many pixels."""
    import torch

    channels = 128
    pixels, weight = torch.ones(1, channels, side, side, dtype=dtype), torch.ones(channels, channels, 3, 3, dtype=dtype)
    return lambda: torch.nn.functional.conv2d(pixels, weight, padding=1), 2.0 * 9 * channels**2 * side**2


def _attention(tokens: int, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """Attention with heads of the transformer's width, eight of its thirty."""
    import torch

    heads, width = 8, 128
    states = torch.ones(1, heads, tokens, width, dtype=dtype)
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(states, states, states), 4.0 * heads * tokens**2 * width


# --- what is remembered -------------------------------------------------------------------------------------------


def cache_file(environ: Mapping[str, str] = os.environ, system: str = sys.platform) -> Path | None:
    """Return where the figures are stored: in the user's folder for caches; None for a user without a home."""
    try:
        home = Path(environ.get("HOME") or Path.home())
    except RuntimeError:
        return None
    if system == "win32":
        folder = Path(environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif system == "darwin":
        folder = home / "Library" / "Caches"
    else:
        folder = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    return folder / "z-image-studio" / "processor.json"


def key() -> str:
    """Return what stored figures hold for: the processor, the version of torch and the number of threads."""
    import torch

    return f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads"


# What decides which of oneDNN's kernels run.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve", "i8mm")


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name and its instructions for bf16, as the system lists them."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    names = re.findall(r"^(?:model name|CPU implementer|CPU part)\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    able = set(flags[1].split()) if flags else set()
    return " ".join((*dict.fromkeys(names), *(flag for flag in _FLAGS if flag in able))) or platform.machine()


def _stored(file: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return the figures of a file by processor, torch and threads; what is not whole is left out."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {key: asdict(_speeds(figures)) for key, figures in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if not isinstance(error, FileNotFoundError):
            log.info("%s is not used: %s", file, error)
        return {}


def _speeds(figures: Mapping[str, Mapping[str, float]]) -> Speeds:
    """Check stored figures. Raises ValueError, TypeError or KeyError where they are none."""
    pairs = {}
    for work in (field.name for field in fields(Speeds)):
        pair = Pair(float(figures[work]["float32"]), float(figures[work]["bfloat16"]))
        if not (0 < pair.float32 < math.inf and 0 <= pair.bfloat16 < math.inf):
            raise ValueError(f"{work}: {pair}")
        pairs[work] = pair
    return Speeds(**pairs)


def _store(known: Mapping[str, object], file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(known, indent=1).encode())
    except (OSError, NotWritten) as error:
        log.info("the processor's figures are not kept: %s", error)
