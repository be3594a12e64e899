"""What the page shows and offers for one model, given the weights on this machine."""

from dataclasses import dataclass
from pathlib import Path

from core.errors import StudioError
from core.messages import Message
from core.request import Model, Request
from core.sizes import IMAGE_SIZES, ImageSizes, WeightsKind
from engine import Engine


@dataclass(frozen=True)
class Situation:
    """What the page shows and offers for one model, given the weights on this machine.

    Attributes:
        kind: of the weights that would draw.
        complete: whether they could.
        texts: which they are, and why.
        tokenizer: the file that counts a prompt's tokens, where there is one.
    """

    kind: WeightsKind
    complete: bool
    texts: tuple[Message | str, ...]
    tokenizer: Path | None = None

    @property
    def sizes(self) -> ImageSizes:
        """Possible widths and heights."""
        return IMAGE_SIZES[self.kind]

    @classmethod
    def of(cls, engine: Engine, mode: type[Request], model: Model, checkpoint: str = "") -> "Situation":
        """Look at which weights a request would use now; missing ones are a text, not an error."""
        try:
            chosen = engine.weights_in_use(mode.mode, model, checkpoint=checkpoint)
        except StudioError as error:
            return cls("full", False, (error.message,))
        texts = tuple(text for text in (chosen.reason, engine.memory_in_use()) if text)
        return cls(chosen.kind, True, texts, next(iter(chosen.files.get("tokenizer", ())), None))
