"""What the page says and offers for one model, given the weights on this machine."""

from dataclasses import dataclass

from core.errors import StudioError
from core.request import Model, Request
from core.sizes import IMAGE_SIZES, ImageSizes, WeightsKind
from engine import Engine


@dataclass(frozen=True)
class Situation:
    """What the page says and offers for one model, given the weights on this machine."""

    kind: WeightsKind
    complete: bool
    sentences: tuple[str, ...]

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
            return cls("full", False, (str(error),))
        return cls(chosen.kind, True, tuple(filter(None, (chosen.reason, engine.memory_in_use()))))
