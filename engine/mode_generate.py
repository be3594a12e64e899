"""Text to image."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial

import mini.config
import mini.notes
from core.events import Stage
from core.request import ResolvedTextToImage, TextToImage
from core.sizes import WeightsKind
from diffusion.memory import MemoryPlan
from engine import drawing
from engine.estimate import Work
from engine.mode import Drawing, Drawn, Job, Mode, Prepared, Studio
from images.cache import Controls
from mini.everyday import understood


def examples(kind: WeightsKind) -> tuple[str, ...]:
    """Return prompts that work with these weights."""
    return mini.notes.EXAMPLES[kind]


def known_things(kind: WeightsKind, language: str) -> list[str]:
    """Return what these weights draw in a language ("en", "zh-CN"), sorted; empty where nobody could list it."""
    return mini.config.known_things(language) if kind == "mini" else []


def unknown_words(prompt: str, kind: WeightsKind) -> list[str]:
    """Return the words of a prompt that these weights were never taught, in lower case."""
    return mini.config.unknown_words(understood(prompt).text) if kind == "mini" else []


class TextToImageMode(Mode[ResolvedTextToImage]):
    """Text to image."""

    request = TextToImage

    def prepare(
        self, request: ResolvedTextToImage, kind: WeightsKind, controls: Controls
    ) -> Generator[Stage, None, Prepared]:
        """Read the header of the request's LoRA."""
        yield from ()
        return Prepared((request.width, request.height), lora=drawing.lora_file(request, kind))

    def work(self, request: ResolvedTextToImage, kind: WeightsKind, size: tuple[int, int], plan: MemoryPlan) -> Work:
        """Return what a request computes."""
        return Work(kind, request.steps, *size, cfg=request.cfg)

    def draw(self, studio: Studio, job: Job[ResolvedTextToImage]) -> Drawing:
        """Draw a picture from a prompt."""
        request, kind = job.request, job.chosen.kind
        pipeline = yield from studio.load(job)
        prompt, on_words = mini.notes.in_known_words(request.prompt, kind)
        prompt, chosen_by_seed = mini.notes.completed(prompt, request.seed, kind)
        draw = partial(
            pipeline.text_to_image,
            prompt=prompt,
            negative_prompt=request.negative_prompt,
            steps=request.steps,
            cfg=request.cfg,
            width=request.width,
            height=request.height,
            seed=request.seed,
            variety=request.variety,
        )
        yield from drawing.lora_stage(job)
        with drawing.lora(pipeline, job) as applied:
            picture = yield from drawing.checked(pipeline, draw, applied.name)
        notes = (*picture.notes, *applied.notes, *chosen_by_seed, *on_words)
        return Drawn(picture.image, notes, applied.inputs, lora=applied.used)
