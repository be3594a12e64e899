"""The engine: one queue for every front, and what comes of each request.

Every front calls `Engine.run(request)` and gets `Queued` while others come first, `Stage` and `Step` while the work is
done, then one `Result` or one `Failure`; closing the generator cancels the request within a step. What draws is a
worker. Importing this module loads no torch.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import TYPE_CHECKING

from core import metadata
from core.errors import InternalError, StudioError
from core.events import Event, Failure, Queued, Result
from core.messages import Message
from core.request import DrawRequest, Model, Preprocess, Resolved, Upscale, WeightsChoice
from core.upload import Upload
from engine import drawing, mode_upscale
from engine.async_run import follow
from engine.bar import with_bar
from engine.fair_queue import FairQueue
from engine.mode import Drawn
from engine.worker import LocalWorker, Outlook, Settings, Worker
from hub import fine_tunes, inventory
from images import preprocess

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25  # how often a waiting request says that it waits, and so can be cancelled


class Engine:
    """The queue in front of a worker. One instance serves every front of a process.

    Args:
        settings: what holds for the whole process.
        worker: what draws; a worker of this process where none is given.
    """

    def __init__(self, settings: Settings | None = None, worker: Worker | None = None) -> None:
        self.settings = settings or Settings()
        self.worker: Worker = worker or LocalWorker(self.settings)
        self._turns = FairQueue(self.settings.queue_limit, self.settings.client_limit)

    def run(
        self, request: DrawRequest, client: str = "", session: str = "", patience: float = POLL_SECONDS
    ) -> Generator[Event, None, None]:
        """Carry out one request, as events.

        Args:
            request: a validated request of any mode.
            client: who asks; the queue is fair among clients, and limits how many requests of one may wait. Nothing,
                where they are not told apart.
            session: which of a client's sessions asks; the queue is fair among these too.
            patience: how long a waiting request waits for its turn in each step of the generator, in seconds; with 0
                it returns at once, and the caller waits by its own means.

        Yields:
            `Queued` while waiting, `Stage` and `Step` while working, then one `Result` or one `Failure`.
        """
        try:
            request = settled(request)
            chosen = self.worker.weights(request.mode, request.model, request.weights, request.checkpoint_name)
            uploads = {name: Upload.open(Path(getattr(request, name)), name) for name in request.files}
            resolved = request.resolved(chosen.kind, uploads)
            with self._turns.ticket(client, session) as ticket:
                while ahead := self._turns.wait(ticket, patience):
                    yield Queued(ahead)
                log.info("%s with %s weights: %s", request.mode, chosen.kind, resolved.model_dump_json())
                drawn = yield from self.worker.draw(resolved, chosen)
            yield _result(resolved, chosen, drawn)
        except GeneratorExit:
            log.info("cancelled: %s", request.mode)
            raise
        except StudioError as error:
            log.info("no picture: %s", error)
            yield Failure.of(error)
        except Exception as error:
            log.exception("internal error")
            yield Failure.of(InternalError(type(error).__name__, str(error)))

    def arun(self, request: DrawRequest, client: str = "", session: str = "") -> AsyncGenerator[Event, None]:
        """Carry out one request, as `run`, for `async for`: the work is done in a thread, and the event loop is free.

        Closing it (`contextlib.aclosing`), or cancelling who waits for it, cancels the request within a step.
        """
        return follow(self.run(request, client, session))

    def draw(self, request: DrawRequest, client: str = "", bar: bool = False) -> Result:
        """Carry out one request and wait for its picture: `run` for notebooks and scripts.

        Args:
            request: a validated request of any mode.
            client: who asks, as in `run`.
            bar: show a progress bar.

        Raises:
            StudioError: what `run` yields as a `Failure`.
        """
        events = self.run(request, client)
        *_, last = with_bar(events) if bar else events
        if isinstance(last, Failure):
            raise last.error()
        assert isinstance(last, Result)  # a run ends with one of the two
        return last

    def is_full(self, client: str = "") -> bool:
        """Whether another request of a client would be refused now, for so many are waiting."""
        return self._turns.is_full(client)

    def weights_in_use(
        self, mode: str, model: Model, asked: WeightsChoice = "auto", checkpoint: str = ""
    ) -> inventory.Chosen:
        """Return which weights a request would use; a request's own choice comes before the process's.

        Raises:
            RequestError: the checkpoint cannot be used.
            WeightsMissing: they are not complete on this machine.
        """
        return self.worker.weights(mode, model, asked, checkpoint)

    def memory_in_use(self) -> Message | None:
        """Return what of the real weights stays in memory, as `Worker.memory`."""
        return self.worker.memory()

    def warm_up(self) -> None:
        """Make ready for a first request in the background, as `Worker.warm_up`."""
        self.worker.warm_up()

    def control_image(self, request: Preprocess) -> preprocess.Control:
        """Return the control image of a request, as `Worker.control_image`."""
        return self.worker.control_image(request)

    def shown_large(self, picture: Path) -> Image.Image:
        """Return a small picture enlarged for the eye, as `mode_upscale.shown_large`; works beside the requests."""
        return mode_upscale.shown_large(picture)

    def foresee(self, request: Upscale) -> mode_upscale.Foreseen:
        """Return what a request will give and take, as `Worker.foresee`."""
        return self.worker.foresee(request)

    def outlook(self) -> Outlook:
        """Return what a usual picture would take with the real weights, as `Worker.outlook`."""
        return self.worker.outlook()


def settled(request: DrawRequest) -> DrawRequest:
    """Return a request with the file of its checkpoint, and the model that this is used as where none was asked for.

    Raises:
        RequestError: the checkpoint cannot be used, not in this mode, or nobody says which model it was made of.
    """
    if not request.checkpoint_name:
        return request
    tune = fine_tunes.find(request.checkpoint_name)
    changes: dict[str, str] = {"checkpoint": tune.name} if request.checkpoint_name == tune.title else {}
    if "model" in type(request).model_fields:
        changes["model"] = tune.used_as(request.model if "model" in request.model_fields_set else None)
    else:
        tune.check_goes_with(request.model)
    return request.model_copy(update=changes)


def _result(request: Resolved, chosen: inventory.Chosen, drawn: Drawn) -> Result:
    notes = (*drawn.notes, *drawing.unused_tags(request))
    inputs, checkpoint = drawn.inputs, None
    if chosen.checkpoint:
        checkpoint = metadata.Checkpoint(chosen.checkpoint, drawn.fingerprints[request.model])
        inputs = {**inputs, "checkpoint": checkpoint.fingerprint}
    provenance = metadata.Provenance(chosen.kind, drawn.fingerprints, inputs, drawn.lora, checkpoint)
    return Result(
        png=metadata.encode_png(drawn.image, request, provenance),
        sidecar={
            **metadata.describe(request, provenance),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": drawn.seconds,
            "notes": [str(note) for note in notes],
        },
        request=request,
        size=drawn.image.size,
        weights=chosen.kind,
        weights_note=chosen.reason,
        seconds=drawn.seconds,
        notes=notes,
    )
