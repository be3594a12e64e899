"""What a mode is: its request, the work that it takes, and how a worker draws it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Generic, Protocol, TypeVar

from core import metadata
from core.events import Event, Stage
from core.messages import Message
from core.request import DrawRequest, Resolved
from core.sizes import WeightsKind
from diffusion.device import Device
from diffusion.memory import MemoryPlan
from engine.estimate import Work
from hub.inventory import Chosen
from images.cache import Controls
from lora.file import LoraFile

if TYPE_CHECKING:
    from PIL import Image

    from diffusion.pipeline import Pipeline

R = TypeVar("R", bound=Resolved)
R_co = TypeVar("R_co", bound=Resolved, covariant=True)


@dataclass(frozen=True)
class Prepared:
    """What is made of a request before anything is loaded; picklable.

    Attributes:
        size: width and height of the picture that will come of it, in pixels.
        image: what the drawing starts from or follows, RGB, where the request brings an image.
        notes: what the user should know.
        inputs: digests of the files that the request names, by field.
        lora: the LoRA's file, judged by its header.
    """

    size: tuple[int, int]
    image: Image.Image | None = None
    notes: tuple[Message, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    lora: LoraFile | None = None


@dataclass(frozen=True)
class Job(Generic[R_co]):
    """A request on its way to a worker's pipeline; picklable."""

    request: R_co
    chosen: Chosen
    prepared: Prepared


@dataclass(frozen=True)
class Drawn:
    """What comes of a job; picklable.

    Attributes:
        image: the picture, RGB or RGBA, 8 bit.
        notes: what the user should know.
        inputs: digests of the files that the request names, by field.
        fingerprints: identities of the weights, by part.
        lora: the LoRA that it was drawn with.
        seconds: wall time of each stage, and `total`.
    """

    image: Image.Image
    notes: tuple[Message, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    lora: metadata.Lora | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


Drawing = Generator[Event, None, Drawn]


class Studio(Protocol):
    """What a mode may use of the worker that draws for it."""

    def machine(self, mode: str, kind: WeightsKind) -> tuple[Device, MemoryPlan]:
        """Return the device and the plan of its memory; imports torch."""
        ...

    def load(self, job: Job[Resolved]) -> Generator[Event, None, Pipeline]:
        """Return the pipeline with the job's models loaded, unless the job is hopeless."""
        ...


class Mode(ABC, Generic[R]):
    """One mode, in `engine.modes.MODES` by its name.

    Attributes:
        request: its request's class, whose `mode` is its name.
    """

    request: ClassVar[type[DrawRequest]]

    @abstractmethod
    def prepare(self, request: R, kind: WeightsKind, controls: Controls) -> Generator[Stage, None, Prepared]:
        """Read the request's files and refuse what is wrong with them, before anything is loaded.

        Raises:
            RequestError: a file cannot be used, or not with these weights.
            WeightsMissing: a preprocessor's model is not on this machine.
        """

    @abstractmethod
    def work(self, request: R, kind: WeightsKind, size: tuple[int, int], plan: MemoryPlan) -> Work:
        """Return what a request computes whose result has this width and height."""

    @abstractmethod
    def draw(self, studio: Studio, job: Job[R]) -> Drawing:
        """Carry out a job."""
