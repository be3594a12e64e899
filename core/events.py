"""What a run yields: how far it is, then one result or one failure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core.errors import StudioError
from core.messages import Message
from core.request import Resolved
from core.sizes import WeightsKind

# Events of a run, in the order in which they come: Queued*, then Stage and Step mixed, then one Result or one Failure.


@dataclass(frozen=True)
class Queued:
    """The request waits: `ahead` requests come before it."""

    ahead: int


@dataclass(frozen=True)
class Stage:
    """Work has entered a stage; `detail` says of what.

    Stages are `starting` (once a process: the program is imported), `loading`, `preprocessing`, `upscaling`,
    `encoding`, `denoising`, `decoding` and `saving`.
    """

    name: str
    detail: Message | str = ""


@dataclass(frozen=True)
class Preview:
    """How a picture looks so far, small: `width` x `height` pixels of red, green and blue, 8 bit each, row by row."""

    width: int
    height: int
    rgb: bytes = field(repr=False)


@dataclass(frozen=True)
class Step:
    """Denoising step `index` (1-based) of `total` is done; `preview` is where the picture is heading."""

    index: int
    total: int
    preview: Preview | None = field(default=None, compare=False)


@dataclass(frozen=True)
class TileDone:
    """Tile `index` (1-based) of `total` of a stage is done; in `denoising`, of all steps together."""

    stage: str
    index: int
    total: int


@dataclass(frozen=True)
class Retry:
    """The work begins again, for a reason; it stays true, and is shown, until the last event."""

    note: Message


@dataclass(frozen=True)
class Result:
    """A finished picture.

    Attributes:
        png: the PNG file, its parameters inside.
        sidecar: the JSON that belongs beside it.
        request: the request with every value that was used.
        size: width and height in pixels.
        weights: `full` or `mini`.
        weights_note: one sentence on which weights drew it, and why.
        seconds: wall time of each stage, and `total`.
        notes: what the user should know.
    """

    png: bytes = field(repr=False)
    sidecar: Mapping[str, Any]
    request: Resolved
    size: tuple[int, int]
    weights: WeightsKind
    weights_note: Message | str
    seconds: Mapping[str, float]
    notes: tuple[Message, ...] = ()

    def _repr_png_(self) -> bytes:
        """Return the picture, which a notebook shows for a result."""
        return self.png


@dataclass(frozen=True)
class Failure:
    """The run ended without a picture; the next one works. Built from an error of `errors`."""

    code: str
    message: Message
    exit_code: int
    http_status: int
    values: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, error: StudioError) -> Failure:
        """Describe `error` as an event."""
        return cls(error.code, error.message, error.exit_code, error.http_status, error.values)

    @property
    def text(self) -> str:
        """The English sentence."""
        return str(self.message)

    def error(self) -> StudioError:
        """Return the error that was described."""
        return StudioError.known(self.code, self.message)


Event = Queued | Stage | Step | TileDone | Retry | Result | Failure


def progress_text(event: Event) -> str:
    """Return how far a run is, in a few English words; empty for its last event."""
    match event:
        case Queued(ahead):
            return f"waiting behind {ahead}"
        case Stage(name, detail):
            return f"{name} {detail}".strip()
        case Step(index, total):
            return f"step {index} of {total}"
        case Retry(note):
            return str(note)
        case TileDone(stage, index, total):
            return f"{stage} tile {index} of {total}"
        case Result() | Failure():
            return ""
