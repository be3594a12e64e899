"""Structure to image: a control image decides where things are, the prompt what they are."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial

import mini.notes
from core.events import Stage
from core.messages import Message
from core.request import PREPROCESSORS, ControlNet, Preprocessor, ResolvedControlNet
from core.sizes import IMAGE_SIZES, WeightsKind
from diffusion.memory import MemoryPlan
from engine import drawing
from engine.estimate import Work
from engine.mode import Drawing, Drawn, Job, Mode, Prepared, Studio
from hub import parts
from hub.inventory import Chosen
from images.cache import Controls


class ControlNetMode(Mode[ResolvedControlNet]):
    """Structure to image."""

    request = ControlNet

    def prepare(
        self, request: ResolvedControlNet, kind: WeightsKind, controls: Controls
    ) -> Generator[Stage, None, Prepared]:
        """Make the control image, or take the one that was shown before; read the header of the request's LoRA."""
        yield Stage("preprocessing", Message("preprocessor", PREPROCESSORS[request.preprocessor].title))
        control = controls.of(request, request.uploads["image"], IMAGE_SIZES[kind])
        lora = drawing.lora_file(request, kind)
        return Prepared(control.image.size, control.image, control.notes, {"image": control.digest}, lora)

    def work(self, request: ResolvedControlNet, kind: WeightsKind, size: tuple[int, int], plan: MemoryPlan) -> Work:
        """Return what a request computes."""
        return Work(kind, request.steps, *size, controlled=True, encodes=True, field="image")

    def draw(self, studio: Studio, job: Job[ResolvedControlNet]) -> Drawing:
        """Draw a picture that follows the control image."""
        request, kind, control = job.request, job.chosen.kind, job.prepared.image
        assert control is not None  # `prepare` made it
        pipeline = yield from studio.load(job)
        # Where the control image decides nothing, the seed does, as without one.
        prompt, on_words = mini.notes.in_known_words(request.prompt, kind)
        notes = mini.notes.untaught_control(request.preprocessor, kind)
        if not request.scale:
            prompt, chosen_by_seed = mini.notes.completed(prompt, request.seed, kind)
            notes = [*chosen_by_seed, *notes]
        notes += on_words
        draw = partial(
            pipeline.text_to_image,
            prompt=prompt,
            negative_prompt=request.unwanted,
            steps=request.steps,
            cfg=request.guidance,
            width=control.width,
            height=control.height,
            seed=request.seed,
            control=(control, request.scale),
        )
        yield from drawing.lora_stage(job)
        with drawing.lora(pipeline, job) as applied:
            picture = yield from drawing.checked(pipeline, draw, applied.name)
        notes += _outdated(request.preprocessor, job.chosen)
        notes = [*job.prepared.notes, *picture.notes, *applied.notes, *notes]
        return Drawn(picture.image, tuple(notes), {**job.prepared.inputs, **applied.inputs}, lora=applied.used)


def _outdated(preprocessor: Preprocessor, chosen: Chosen) -> list[Message]:
    """Return what to do where the ControlNet is of a release that was not taught a preprocessor's images yet."""
    since = parts.TAUGHT_SINCE.get(preprocessor, parts.FIRST_UNION)
    here = parts.controlnet_release(chosen.files["controlnet"][0].name)
    if chosen.kind == "mini" or here >= since:
        return []
    text = "The ControlNet on this machine is of {here}; {preprocessor} was taught to the one of {since}: {command}"
    title = Message("preprocessor", PREPROCESSORS[preprocessor].title)
    command = f"{parts.FETCH} controlnet"
    return [
        Message("older_controlnet", text, here=_month(here), preprocessor=title, since=_month(since), command=command)
    ]


def _month(release: int) -> str:
    """Return a release as a month: 2602 is 2026-02."""
    return f"20{release // 100}-{release % 100:02}"
