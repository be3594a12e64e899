"""A request's LoRA around its drawing: found and judged before, on the transformer during, named in the result after.

Knows nothing of how a LoRA is read (`lora`) or put on (`adapter`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import safeguard
from core import metadata
from core.events import Event, Note, Stage
from core.request import MODELS, Request
from core.sizes import WeightsKind
from lora.file import LoraFile, find, read

if TYPE_CHECKING:
    from diffusion.pipeline import Picture, Pipeline, Progress


@dataclass(frozen=True)
class Worn:
    """What a request's LoRA adds to its result; nothing where there is none."""

    notes: tuple[Note, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    lora: metadata.Lora | None = None


def file_of(request: Request, kind: WeightsKind) -> LoraFile | None:
    """Return the file of the LoRA that a request names, judged by its header alone: before anything is loaded.

    Raises:
        RequestError: it cannot be used, or not with these weights.
    """
    if not getattr(request, "lora", ""):
        return None
    file = read(find(request.lora))
    file.report.check_fits(kind)
    return file


def wearing(
    pipeline: Pipeline, file: LoraFile | None, request: Request, draw: Callable[[], Progress]
) -> Generator[Event, None, tuple[Picture, Worn]]:
    """Carry out a drawing with the request's LoRA, if it has one, and look at what comes of it."""
    if file is None:
        return (yield from safeguard.checked(pipeline, draw)), Worn()
    yield Stage("loading", "LoRA")
    adapter = pipeline.loras.get(file)
    drawing = safeguard.checked(pipeline, draw, file.report.name)
    picture = yield from pipeline.wearing(adapter, request.lora_strength, drawing)
    report = adapter.report
    notes = [Note("lora_partly", sentence) for sentence in report.warnings()]
    if report.base not in (None, request.model):
        trained, used = MODELS[report.base].title, MODELS[request.model].title
        notes.append(Note("lora_base", f"The LoRA was trained on {trained}; with {used} it may do less, or harm."))
    used = metadata.Lora(file.report.name, adapter.identity.hash, request.lora_strength)
    return picture, Worn(tuple(notes), {"lora": adapter.identity.digest}, used)
