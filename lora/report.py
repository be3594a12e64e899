"""The report of a LoRA file: what it is, what of it is not used, and which weights it fits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from core.errors import RequestError
from core.messages import Message, plain
from core.request import Model
from core.sizes import WeightsKind
from hub.naming import LAYER_SIZES

PARTLY = "lora_partly"  # the code of each warning
NAMES_SHOWN = 3  # of layers or tensors, in a sentence


@dataclass(frozen=True)
class Report:
    """What a LoRA file is, as far as its header tells; `facts` is the same for JSON.

    Attributes:
        name: the file's name without its ending.
        bytes: its length.
        dialect: how its names are written, for people.
        ranks: the lowest and the highest rank; None where nothing has one.
        alphas: the lowest and the highest alpha; None where the file gives none.
        size: which transformer its shapes fit.
        matched: the transformer's modules that it changes.
        layers: how many layers the file has for the transformer, left out or not.
        left_out: layers and tensors that have no place in the transformer, as the file names them.
        repeats: layers that are not used because others of the file change the same in the same way.
        text_encoder: layers for a text encoder, which are not used.
        base: the model that it was trained on, where the metadata says so.
        trigger_words: words that call it, where the metadata gives some.
        title: the name that its maker gave it, or empty.
        alpha_missing: whether PEFT wrote it, which keeps the alphas in a file of their own, and that one is not there.
    """

    name: str
    bytes: int
    dialect: str
    ranks: tuple[int, int] | None
    alphas: tuple[float, float] | None
    size: WeightsKind
    matched: tuple[str, ...]
    layers: int
    left_out: tuple[str, ...]
    repeats: tuple[str, ...]
    text_encoder: tuple[str, ...]
    base: Model | None
    trigger_words: tuple[str, ...]
    title: str
    alpha_missing: bool = False

    @property
    def used(self) -> int:
        """How many of the file's layers for the transformer are used."""
        return self.layers - len(self.left_out)

    @property
    def rank(self) -> Message | str:
        """The lowest and the highest rank, for people."""
        return _span(self.ranks)

    def facts(self) -> dict[str, Any]:
        """Return the report as a dictionary for JSON and for people."""
        facts = {
            "name": self.name,
            "title": self.title,
            "bytes": self.bytes,
            "dialect": self.dialect,
            "rank": self.rank,
            "alpha": _span(self.alphas),
            "fits": LAYER_SIZES[self.size].title,
            "trained_on": self.base or "unknown",
            "trigger_words": self.trigger_words,
            "layers": f"{self.used} of {self.layers} matched",
            "matched": self.matched,
            "left_out": self.left_out,
            "repeats": self.repeats,
            "text_encoder": self.text_encoder,
            "notes": self.warnings(),
        }
        return {name: plain(value) for name, value in facts.items()}

    def warnings(self) -> list[Message]:
        """Return what of the file is not used, a sentence each."""
        warnings = []
        if self.left_out:
            text = "{left_out} of {layers} layers of the LoRA have no place in Z-Image and are left out: {names}."
            names = some_of(self.left_out)
            warnings.append(Message(PARTLY, text, left_out=len(self.left_out), layers=self.layers, names=names))
        if self.text_encoder:
            text = "The LoRA's {layers} layers for the text encoder are not used."
            warnings.append(Message(PARTLY, text, layers=len(self.text_encoder)))
        if self.repeats:
            text = "{layers} layers of the LoRA are there again under other names; one of each is used: not {names}."
            warnings.append(Message(PARTLY, text, layers=len(self.repeats), names=some_of(self.repeats)))
        if self.alpha_missing:
            text = (
                "PEFT keeps the LoRA's alpha in adapter_config.json, which is not beside it: strength 1 is a guess. "
                "Give --lora the folder with both files, or try other strengths."
            )
            warnings.append(Message("lora_alpha", text))
        return warnings

    def check_fits(self, size: WeightsKind) -> None:
        """Refuse weights that the LoRA was not made for.

        Raises:
            RequestError: its shapes are another size's.
        """
        if size != self.size:
            text = "a LoRA for {size}; this one was made for {other}"
            raise refused(self.name, text, size=LAYER_SIZES[size].title, other=LAYER_SIZES[self.size].title)


def refused(name: str, text: str, /, **values: Any) -> RequestError:
    """Return the error of a file that cannot be used.

    Args:
        name: the file's name.
        text: the template of what would have been possible.
        **values: what belongs into the template.
    """
    return RequestError("lora", name, Message("lora_refused", text, **values))


def clean(text: str) -> str:
    """Return a text from outside in one line without control characters, of bounded length."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:300]).split())


def some_of(names: Iterable[str]) -> Message | list[str]:
    """Return the first names from a file, and how many there are besides."""
    names = list(names)
    shown = [clean(name)[:100] for name in names[:NAMES_SHOWN]]
    if len(names) <= NAMES_SHOWN:
        return shown
    return Message("names", "{names} and {more} more", names=shown, more=len(names) - NAMES_SHOWN)


def _span(bounds: tuple[float, float] | None) -> Message | str:
    if bounds is None:
        return Message("none", "none")
    low, high = (f"{bound:g}" for bound in bounds)
    return low if low == high else Message("span", "{low} to {high}", low=low, high=high)
