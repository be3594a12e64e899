"""What a ZeroGPU Space has packed: the weights that can be drawn with, and who they were.

Packing may delete the files, so what is asked about them later has to be known by then.
"""

from __future__ import annotations

from core.errors import RequestError, WeightsMissing
from core.request import WeightsChoice
from core.sizes import WeightsKind
from hub import checkpoint, inventory


class Packed:
    """The weights that were loaded before the launch, all of one kind; false while there are none."""

    def __init__(self) -> None:
        self._chosen: dict[tuple[str, str], inventory.Chosen] = {}
        self.fingerprints: dict[str, str] = {}  # by part

    def __bool__(self) -> bool:
        return bool(self._chosen)

    @property
    def kind(self) -> WeightsKind:
        """Of all of them."""
        return next(iter(self._chosen.values())).kind

    def add(self, mode: str, model: str, chosen: inventory.Chosen) -> None:
        """Note what a mode draws with; the files are still there."""
        self._chosen[mode, model] = chosen
        self.fingerprints |= {part: checkpoint.fingerprint(files) for part, files in chosen.files.items()}

    def of(self, mode: str, model: str, asked: WeightsChoice) -> inventory.Chosen:
        """Return what a mode draws with.

        Raises:
            RequestError: another kind is asked for.
            WeightsMissing: this mode's were not there.
        """
        if asked not in ("auto", self.kind):
            raise RequestError("weights", asked, f"auto or {self.kind} on this Space")
        if (mode, model) not in self._chosen:
            raise WeightsMissing(f"this Space has no weights for the mode {mode} with the model {model}")
        return self._chosen[mode, model]
