"""What a mode hands back for its result, and what holds for a whole process."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from core import metadata
from core.events import Event
from core.messages import Message

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")


@dataclass(frozen=True)
class Drawn:
    """What a mode hands back for its result.

    Attributes:
        image: the picture, RGB or RGBA, 8 bit.
        notes: what the user should know.
        inputs: digests of the files that the request names, by field.
        fingerprints: identities of weights used beyond those in `Chosen`, by name.
        lora: the LoRA that it was drawn with.
    """

    image: Image.Image
    notes: tuple[Message, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    lora: metadata.Lora | None = None


Drawing = Generator[Event, None, Drawn]
