"""A drawing that is looked at before it counts: a broken result is drawn once more in safe mode, or refused by name.

Knows what to do about a defect; what a defect is, `sanity` knows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from core.errors import BrokenPicture
from core.events import Note, Stage
from diffusion import sanity

if TYPE_CHECKING:
    from diffusion.pipeline import Pipeline, Progress

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
        yield Stage("safe mode", f"because {defect.seen}")
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
    text = f"Drawn in safe mode (fp32 VAE, SDPA attention), because without it {first.seen}."
    return replace(picture, notes=(*picture.notes, Note("safe_mode", text, {"defect": first.code})))
