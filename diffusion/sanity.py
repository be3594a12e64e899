"""A check of results: NaN, black, flat and clipped ones are recognised, and their likely cause is named.

Latents tell more than pixels: a NaN becomes a plain black image in 8 bit, and a prompt may well ask for one. So a
plain image is only a fault where the latents that it came from are not plain too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from core.messages import Message

if TYPE_CHECKING:
    import torch

# Latents of these models have about unit variance. Over the miniature's prompts their largest number was below 8.
LATENT_LIMIT = 30.0
# Beyond this, colours far outside of white and black are the latents' own: one guided step of Base reaches 21.
LATENTS_USUAL = 10.0
# Deviation of the latents over the image, mean of the channels, below which nothing was drawn at all. A plain
# background, asked of the miniature by itself, had 0.27 and more.
LATENTS_EMPTY = 1e-3
# A decoded image lies within -1..1, with overshoots of some tenths. Share of it that may lie beyond twice that.
CLIPPED_AT, CLIPPED_SHARE = 2.0, 0.25
# Deviation of the decoded image below which it is one colour: half a level of 8 bit.
FLAT = 0.5 / 127.5
# Deviation of latents that a decoder must show something of.
LATENTS_VARIED = 0.5


@dataclass(frozen=True)
class Health:
    """Measurements of a result before it is rounded to 8 bit.

    Attributes:
        latents_finite: whether every latent is a number.
        latents_peak: the largest latent, without its sign.
        latents_spread: deviation over the image, mean of the channels; unit variance is usual.
        pixels_finite: whether every decoded value is a number.
        pixels_spread: deviation over the image, largest of the channels; -1..1 is the image's range.
        pixels_clipped: share of decoded values that lie far outside -1..1.
    """

    latents_finite: bool
    latents_peak: float
    latents_spread: float
    pixels_finite: bool
    pixels_spread: float
    pixels_clipped: float


def measure(latents: torch.Tensor, decoded: torch.Tensor) -> Health:
    """Measure latents [1, 16, h, w] and what was decoded from them, [1, 3, 8 h, 8 w] in about -1..1."""
    latents, decoded = latents.float(), decoded.float()
    return Health(
        bool(latents.isfinite().all()),
        float(latents.abs().max()),
        float(latents.flatten(2).std(-1).mean()),
        bool(decoded.isfinite().all()),
        float(decoded.flatten(2).std(-1).max()),
        float((decoded.abs() > CLIPPED_AT).float().mean()),
    )


DefectCode = Literal["nan", "exploded", "empty", "flat", "clipped"]
DrawingStage = Literal["denoising", "decoding"]


@dataclass(frozen=True)
class Defect:
    """A fault of a result: a code, the stage that caused it, and what was seen, as a clause."""

    code: DefectCode
    stage: DrawingStage
    seen: Message


def judge(health: Health) -> Defect | None:
    """Return what is wrong with a result; None where it is an image, a plain one included."""
    if not health.latents_finite:
        return _defect("nan", "denoising", "the transformer's result holds NaN or infinity, which would show as black")
    if health.latents_peak > LATENT_LIMIT:
        text = "the transformer's result reaches {peak} where some 5 is usual: noise, not a picture"
        return _defect("exploded", "denoising", text, peak=round(health.latents_peak))
    if health.latents_spread < LATENTS_EMPTY:
        return _defect("empty", "denoising", "the transformer's result is the same all over")
    if not health.pixels_finite:
        return _defect("nan", "decoding", "the VAE made NaN or infinity of sound latents, which would show as black")
    if health.pixels_clipped > CLIPPED_SHARE and health.latents_peak <= LATENTS_USUAL:
        text = "{percent}% of the picture lies far beyond black and white"
        return _defect("clipped", "decoding", text, percent=round(100 * health.pixels_clipped))
    if health.pixels_spread < FLAT and health.latents_spread > LATENTS_VARIED:
        return _defect("flat", "decoding", "the VAE made one plain colour of latents that vary")
    return None


def _defect(code: DefectCode, stage: DrawingStage, text: str, **values: int) -> Defect:
    return Defect(code, stage, Message(code, text, **values))


def likely_cause(defect: Defect, *, dtype: str, attention: str, lora: str | None) -> Message:
    """Return what such a result usually comes from, as a sentence for the user.

    Args:
        defect: what was seen.
        dtype: what the transformer computes in.
        attention: DiffSynth's attention backend; "torch" is SDPA, which is exact.
        lora: the name of the LoRA that was applied, if any.
    """
    if defect.stage == "decoding":
        text = "Likely cause: the VAE's file is damaged, since computing it in fp32 did not help."
        return Message("cause_vae", text)
    if lora is not None:
        text = "Likely cause: the LoRA {name!r}; try a lower strength, or draw without it."
        return Message("cause_lora", text, name=lora)
    if attention != "torch":
        text = "Likely cause: the attention backend {backend!r}; unset DIFFSYNTH_ATTENTION_IMPLEMENTATION."
        return Message("cause_attention", text, backend=attention)
    if dtype == "float16":
        return Message("cause_dtype", "Likely cause: float16, whose range is too small for these models.")
    text = "Likely cause: the transformer's file is damaged; the arithmetic ({dtype}, SDPA) is not suspect."
    return Message("cause_transformer", text, dtype=dtype)
