"""What the page says and offers for one model, given the weights on this machine."""

from dataclasses import dataclass

from core.errors import StudioError
from core.messages import Message
from core.request import Model, Request
from core.sizes import IMAGE_SIZES, ImageSizes, WeightsKind
from engine import Engine


@dataclass(frozen=True)
class Situation:
    """What the page says and offers for one model, given the weights on this machine."""

    kind: WeightsKind
    complete: bool
    texts: tuple[Message | str, ...]

    @property
    def sizes(self) -> ImageSizes:
        """Possible widths and heights."""
        return IMAGE_SIZES[self.kind]

    @classmethod
    def of(cls, engine: Engine, mode: type[Request], model: Model) -> "Situation":
        """Look at which weights a request would use now; missing ones are a sentence, not an error."""
        try:
            chosen = engine.weights_in_use(mode.mode, model)
        except StudioError as error:
            return cls("full", False, (error.message,))
        return cls(chosen.kind, True, tuple(text for text in (chosen.reason, engine.worker.memory()) if text))
