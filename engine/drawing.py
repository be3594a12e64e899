"""A drawing with what surrounds it: the request's LoRA, and a look at the result before it counts.

A broken result is drawn once more in safe mode, or refused by name; what a defect is, `diffusion.sanity` decides. How a
LoRA is read is `lora.file`'s matter, how it is applied `lora.adapter`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from core import metadata
from core.errors import BrokenPicture
from core.events import Event, Stage
from core.messages import Message
from core.request import MODELS, ControlNet, Request, TextToImage
from core.sizes import WeightsKind
from diffusion import sanity
from lora.file import LoraFile, find, read

if TYPE_CHECKING:
    from diffusion.pipeline import Picture, Pipeline, Progress


@dataclass(frozen=True)
class Worn:
    """What a request's LoRA adds to its result; nothing where there is none."""

    notes: tuple[Message, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    lora: metadata.Lora | None = None


def file_of(request: Request, kind: WeightsKind) -> LoraFile | None:
    """Return the file of the LoRA that a request names, judged by its header alone: before anything is loaded.

    Raises:
        RequestError: it cannot be used, or not with these weights.
    """
    if not isinstance(request, TextToImage | ControlNet) or not request.lora:
        return None
    file = read(find(request.lora))
    file.report.check_fits(kind)
    return file


def wearing(
    pipeline: Pipeline, file: LoraFile | None, request: TextToImage | ControlNet, draw: Callable[[], Progress]
) -> Generator[Event, None, tuple[Picture, Worn]]:
    """Carry out a drawing with the request's LoRA, if it has one, and look at what comes of it."""
    if file is None:
        return (yield from checked(pipeline, draw)), Worn()
    yield Stage("loading", "LoRA")
    adapter = pipeline.loras.get(file)
    drawing = checked(pipeline, draw, file.report.name)
    picture = yield from pipeline.wearing(adapter, request.lora_strength, drawing)
    report = adapter.report
    notes = [Message("lora_partly", sentence) for sentence in report.warnings()]
    if report.base not in (None, request.model):
        trained_on, drawn_with = MODELS[report.base].title, MODELS[request.model].title
        notes.append(
            Message(
                "lora_base",
                "The LoRA was trained on {trained}; with {used} it may do less, or harm.",
                trained=trained_on,
                used=drawn_with,
            )
        )
    used = metadata.Lora(file.report.name, adapter.identity.hash, request.lora_strength)
    return picture, Worn(tuple(notes), {"lora": adapter.identity.digest}, used)


log = logging.getLogger(__name__)


def checked(pipeline: Pipeline, draw: Callable[[], Progress], lora: str | None = None) -> Progress:
    """Carry out a drawing and look at its result; where that is broken, once more in safe mode (fp32 VAE, SDPA).

    Sound latents are only decoded again. Where safe mode would compute the very same, nothing is tried again.

    Args:
        pipeline: what draws.
        draw: begins the drawing; called again for a second attempt.
        lora: the name of the LoRA that is worn, for the likely cause.

    Raises:
        BrokenPicture: the result is no picture, and what it likely comes from.
    """
    picture = yield from draw()
    defect = sanity.judge(picture.health)
    if defect is None:
        return picture
    log.warning("broken result: %s (%s)", defect.seen, picture.health)
    first = defect
    if pipeline.safe_mode_differs():
        yield Stage("safe mode", Message("safe_mode", "because {seen}", seen=defect.seen))
        with pipeline.safe_mode():
            if defect.stage == "decoding":
                image, health = pipeline.decode(picture.latents)
                picture = replace(picture, image=image, health=health)
            else:
                picture = yield from draw()
        defect = sanity.judge(picture.health)
    if defect is not None:
        cause = sanity.likely_cause(defect, dtype=pipeline.dtype_name, attention=pipeline.attention, lora=lora)
        raise BrokenPicture(f"no picture came of it: {defect.seen}. {cause}", defect=defect.code, stage=defect.stage)
    text = "Drawn in safe mode (fp32 VAE, SDPA attention), because without it {seen}."
    return replace(picture, notes=(*picture.notes, Message("safe_mode", text, seen=first.seen)))
