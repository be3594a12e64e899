"""What surrounds a drawing: the request's LoRA, and a look at the result before it counts.

A broken result is drawn once more in safe mode, or refused by name; what a defect is, `diffusion.sanity` decides. How a
LoRA is read is `lora.file`'s matter, how it is applied `lora.adapter`'s.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import metadata
from core.errors import BrokenPicture
from core.events import Stage
from core.messages import Message
from core.request import MODELS, Resolved, ResolvedControlNet, ResolvedTextToImage
from core.sizes import WeightsKind
from diffusion import sanity
from engine.mode import Job
from lora.file import LoraFile, find, read
from lora.report import Report, some_of

if TYPE_CHECKING:
    from diffusion.pipeline import Pipeline, Progress

log = logging.getLogger(__name__)

# How A1111 and its like call a LoRA inside a prompt: "<lora:name:0.8>".
LORA_TAG = re.compile(r"<\s*(?:lora|lyco|lycoris|hypernet)\s*:[^<>]{1,300}>", re.IGNORECASE)


@dataclass(frozen=True)
class Applied:
    """What a request's LoRA adds to its result; nothing where there is none."""

    name: str | None = None
    notes: tuple[Message, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    used: metadata.Lora | None = None


def lora_file(request: ResolvedTextToImage | ResolvedControlNet, kind: WeightsKind) -> LoraFile | None:
    """Return the file of the LoRA that a request names, judged by its header alone.

    Raises:
        RequestError: it cannot be used, or not with these weights.
    """
    if not request.lora:
        return None
    file = read(find(request.lora))
    file.report.check_fits(kind)
    return file


def lora_report(path: Path) -> Report:
    """Return what a LoRA file is, from its header alone.

    Raises:
        RequestError: it cannot be used at all.
    """
    return read(path).report


def unused_tags(request: Resolved) -> list[Message]:
    """Return a note on what names a LoRA inside a prompt: here it is words like all others."""
    if not (tags := list(dict.fromkeys(LORA_TAG.findall(f"{request.prompt}\n{request.unwanted}")))):
        return []
    if "lora" not in type(request).model_fields:
        text = "{tags} in the prompt is not used as a LoRA, but read as words: this mode takes none."
        return [Message("lora_tag", text, tags=some_of(tags))]
    text = (
        "{tags} in the prompt is not used as a LoRA, but read as words. Take it out, and choose the file and its "
        "strength under Use a LoRA (--lora FILE:STRENGTH)."
    )
    return [Message("lora_tag", text, tags=some_of(tags))]


def lora_stage(job: Job[Any]) -> Iterator[Stage]:
    """Announce that a job's LoRA is loaded, if it has one."""
    if job.prepared.lora is not None:
        yield Stage("loading", Message("stage", "LoRA"))


@contextmanager
def lora(pipeline: Pipeline, job: Job[Any]) -> Iterator[Applied]:
    """Apply a job's LoRA, if it has one, to the transformer loaded last, inside the block."""
    file, request = job.prepared.lora, job.request
    if file is None:
        yield Applied()
        return
    adapter = pipeline.loras.get(file)
    report = adapter.report
    notes = report.warnings()
    if report.base not in (None, request.model):
        text = "The LoRA was trained on {trained}; with {used} it may do less, or harm."
        trained, used = MODELS[report.base].title, MODELS[request.model].title
        notes.append(Message("lora_base", text, trained=trained, used=used))
    recorded = metadata.Lora(file.report.name, adapter.identity.hash, request.lora_strength)
    with pipeline.lora(adapter, request.lora_strength):
        yield Applied(file.report.name, tuple(notes), {"lora": adapter.identity.digest}, recorded)


def checked(pipeline: Pipeline, draw: Callable[[], Progress], lora: str | None = None) -> Progress:
    """Carry out a drawing and look at its result; where that is broken, once more in safe mode (fp32 VAE, SDPA).

    Sound latents are only decoded again. Where safe mode would compute the very same, nothing is tried again.

    Args:
        pipeline: what draws.
        draw: begins the drawing; called again for a second attempt.
        lora: the name of the LoRA that is applied, for the likely cause.

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
        text = "no picture came of it: {seen}. {cause}"
        raise BrokenPicture(text, seen=defect.seen, cause=cause, defect=defect.code, stage=defect.stage)
    text = "Drawn in safe mode (fp32 VAE, SDPA attention), because without it {seen}."
    return replace(picture, notes=(*picture.notes, Message("safe_mode", text, seen=first.seen)))
