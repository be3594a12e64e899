"""Jobs: requests of any mode that go on without their client, who asks about them, and fetches what comes of them."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from core import metadata
from core.errors import QueueFull, RequestError, StudioError
from core.events import Event, Failure, Preview, Queued, Result, Retry, Stage, Step, TileDone
from core.request import MODES, DrawRequest, Preprocess
from core.request import Request as ModeRequest
from engine import Engine
from engine.timing import Pace
from web import bodies, own_files
from web.api_errors import RESPONSES, ApiError, ErrorAnswer, ErrorFacts
from web.following import begin, while_connected
from web.image_formats import small
from web.kept_files import KEPT_SECONDS, KeptFiles, address
from web.names_only import names_only
from web.run import stepped
from web.upload_limits import MAX_LORA

MOST_ENDED = 1000  # jobs that have ended and are remembered, each with some kilobytes
FILES = ("image", "lora")

GONE = "there is no job of this id: one that has ended is kept for an hour, or less where much comes, and then expires"
LOST = "the server was started again since this job was sent, and has lost it: send it again"
NOT_LISTED = "jobs are listed for those who send a key, or are at this machine: keep the id that the answer gave"

State = Literal["queued", "running", "done", "failed", "cancelled"]


class JobFile(BaseModel):
    """A file that has come of a job."""

    name: str
    url: str = Field(description="Where it can be fetched until the job expires.")
    media_type: str
    size: int = Field(description="In bytes.")


class JobFacts(BaseModel):
    """A job as it is now."""

    id: str
    object: Literal["job"] = "job"
    mode: str
    state: State
    created: int = Field(description="Seconds since 1970.")
    expires: int | None = Field(
        default=None, description="When it and its files go, once it has ended; seconds since 1970."
    )
    place: int | None = Field(default=None, description="How many requests come before it, while it is queued.")
    stage: str | None = Field(default=None, description="What is being done: loading, denoising, decoding, ...")
    step: int | None = Field(default=None, description="The step, or tile, of this stage that is done.")
    total: int | None = Field(default=None, description="How many there are.")
    seconds_left: float | None = Field(default=None, description="Until the last step, where it is known.")
    preview: str | None = Field(default=None, description="How the picture looks so far: a small JPEG as a data URL.")
    error: ErrorFacts | None = Field(default=None, description="Why it has failed.")
    files: list[JobFile] = Field(default=[], description="What has come of it: the PNG, and its parameters as JSON.")
    seed: int | None = Field(default=None, description="The seed that was used.")
    parameters: dict[str, Any] | None = Field(default=None, description="Every value that was used, and the weights.")
    notes: list[str] = Field(default=[], description="What the user should know.")


class JobList(BaseModel):
    """The caller's jobs, the newest first."""

    object: Literal["list"] = "list"
    data: list[JobFacts]


@dataclass(frozen=True)
class Made:
    """What comes of a job: files, each with what it holds and of which type; parameters; notes; and the seed."""

    files: dict[str, tuple[bytes, str]]
    parameters: dict[str, Any]
    notes: list[str]
    seed: int | None = None


@dataclass
class Job:
    """A job: whose it is, what is known of it, and what works on it.

    Attributes:
        client: whom the queue counts it for.
        owner: the key that it belongs to, where keys are asked for.
        facts: what its owner is told, but for the preview and the files' addresses.
        files: what has come of it: a name for each, and its name among the kept files.
    """

    client: str
    owner: str | None
    facts: JobFacts
    pace: Pace = field(default_factory=Pace)
    preview: Preview | None = None
    files: dict[str, str] = field(default_factory=dict)
    work: asyncio.Task[None] | None = None

    def see(self, event: Event | Made) -> None:
        """Note how far it is."""
        facts = self.facts
        if isinstance(event, Queued | Stage | Step | TileDone):
            facts.state, facts.place, facts.step, facts.total = "running", None, None, None
            facts.seconds_left = self.pace.left(event)
        match event:
            case Queued(ahead):
                facts.state, facts.place = "queued", ahead
            case Stage(name):
                facts.stage = name
            case Step(index, total, preview):
                facts.stage, facts.step, facts.total = "denoising", index, total
                self.preview = preview or self.preview
            case TileDone(stage, index, total):
                facts.stage, facts.step, facts.total = stage, index, total
            case Retry(note):
                facts.notes = [str(names_only(note))]
                self.pace, self.preview = Pace(), None

    def end(self, state: State, expires: float, error: ErrorFacts | None = None) -> None:
        """Note how it has ended; nothing is as it was on the way."""
        facts = self.facts
        facts.state, facts.expires, facts.error = state, int(expires), error
        facts.place = facts.stage = facts.step = facts.total = facts.seconds_left = self.preview = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing will come of it any more."""
        return self.facts.expires is not None


class Jobs:
    """The jobs of this process: those that wait or run, and for a time those that have ended.

    Args:
        engine: what draws.
        kept: where their files are kept.
    """

    def __init__(self, engine: Engine, kept: KeptFiles) -> None:
        self._engine, self._kept = engine, kept
        self._jobs: dict[str, Job] = {}  # the oldest first
        self._start = secrets.token_hex(4)  # a part of each id: those of another start of the server are told by it

    def find(self, name: str, owner: str | None) -> Job:
        """Return a job of a caller's.

        Raises:
            ApiError: there is none, or not any more.
        """
        self._sweep()
        job = self._jobs.get(name)
        if job is not None and job.owner == owner:
            return job
        known = re.fullmatch(r"job_([0-9a-f]{8})_[0-9a-f]{32}", name)
        if known and known[1] != self._start:
            raise ApiError(410, LOST, "job_lost")
        raise ApiError(404, GONE, "job_not_found")

    def of(self, owner: str | None) -> list[Job]:
        """Return a caller's jobs, the newest first."""
        self._sweep()
        return [job for job in reversed(self._jobs.values()) if job.owner == owner]

    def check_room(self, client: str) -> None:
        """See to it that there is a place for another job of a client; the queue has its own limits besides.

        Raises:
            QueueFull: there is none.
        """
        self._sweep()
        limits, under_way = self._engine.settings, [job.client for job in self._jobs.values() if not job.has_ended]
        if len(under_way) > limits.queue_limit:
            raise QueueFull(limits.queue_limit)
        if client and 0 < limits.client_limit < under_way.count(client):
            raise QueueFull(limits.client_limit)

    def begin(
        self, mode: str, asker: tuple[str, str | None], first: Event | Made, run: AsyncGenerator[Any], held: ExitStack
    ) -> Job:
        """Go on with a run whose first event has come, and let go what is `held` for it at its end."""
        name = f"job_{self._start}_{secrets.token_hex(16)}"
        job = Job(*asker, JobFacts(id=name, mode=mode, state="queued", created=int(time.time())))
        job.see(first)
        self._jobs[name] = job
        job.work = asyncio.create_task(self._work(job, first, run, held))
        return job

    def cancel(self, job: Job) -> None:
        """Stop a job within a step, or remove one that has ended, with its files."""
        if job.work is not None and not job.has_ended:
            job.work.cancel()
            job.end("cancelled", time.time() + KEPT_SECONDS)
        else:
            self._forget(job)

    async def _work(self, job: Job, first: Event | Made, run: AsyncGenerator[Any], held: ExitStack) -> None:
        with held:
            try:
                async with aclosing(run):
                    if isinstance(first, Result | Made):  # nothing came before it
                        await self._keep(job, first)
                    async for event in run:
                        job.see(event)
                        if isinstance(event, Failure):
                            raise ApiError.of(event)
                        if isinstance(event, Result | Made):
                            await self._keep(job, event)
            except Exception as error:  # whatever it is, only the job can tell it
                facts = ErrorFacts(**ApiError.of(error).facts)
                if not job.has_ended:
                    job.end("failed", time.time() + KEPT_SECONDS, facts)

    async def _keep(self, job: Job, made: Result | Made) -> None:
        made = _made(made) if isinstance(made, Result) else made
        expires = time.time() + KEPT_SECONDS

        def keep() -> None:
            for name, (data, media_type) in made.files.items():
                job.files[name] = self._kept.keep(data, Path(name).suffix, media_type)

        keeping = asyncio.ensure_future(asyncio.to_thread(keep))
        try:
            await asyncio.shield(keeping)
        except asyncio.CancelledError:
            await keeping  # a thread cannot be stopped, and what it still keeps would be nobody's
            self._drop_files(job)
            raise
        job.facts.parameters, job.facts.notes, job.facts.seed = made.parameters, made.notes, made.seed
        job.end("done", expires)

    def _sweep(self) -> None:
        """Forget what has expired, whose files have gone, or is too much: the oldest first."""
        ended, kept = [job for job in self._jobs.values() if job.has_ended], self._kept.names()
        for number, job in enumerate(ended):
            expired = (job.facts.expires or 0) <= time.time() or len(ended) - number > MOST_ENDED
            if expired or not kept.issuperset(job.files.values()):
                self._forget(job)

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.facts.id, None)
        self._drop_files(job)

    def _drop_files(self, job: Job) -> None:
        for name in job.files.values():
            self._kept.drop(name)
        job.files.clear()


def router(engine: Engine, kept: KeptFiles, private: bool) -> APIRouter:
    """Return the routes.

    Args:
        engine: what draws.
        kept: where the jobs' files are kept.
        private: whether nobody but those at this machine is meant to come: they see each other's jobs.
    """
    routes = APIRouter(responses=RESPONSES, tags=["jobs"])
    jobs = Jobs(engine, kept)
    modes: dict[str, type[ModeRequest]] = {**MODES, Preprocess.mode: Preprocess}
    kinds = {"application/json": [*modes.values()], "multipart/form-data": [*modes.values()]}
    lost: dict[int | str, dict[str, Any]] = {
        410: {"model": ErrorAnswer, "description": "The server was started again since this job was sent."}
    }

    @routes.post(
        "/jobs",
        summary="Send a request that goes on without its client",
        status_code=202,
        response_model=JobFacts,
        responses={202: {"headers": {"Location": {"schema": {"type": "string"}, "description": "The job."}}}},
        openapi_extra=bodies.described(kinds, FILES),
    )
    async def send(request: Request) -> Response:
        client, owner = request.state.client, request.state.owner
        jobs.check_room(client)
        with ExitStack() as stack:
            folder = stack.enter_context(own_files.for_a_request())
            fields = await bodies.read(request, Path(folder), FILES, MAX_LORA)
            name = fields.pop("mode", None)
            mode = modes.get(name) if isinstance(name, str) else None
            if mode is None:
                raise RequestError("mode", name, ", ".join(modes))
            for file in set(FILES) & fields.keys() - mode.model_fields.keys():
                mode.check(file, Path(str(fields[file])).name)
            run: AsyncGenerator[Any]
            if issubclass(mode, DrawRequest):
                run = begin(engine, request, mode, fields)
            else:
                run = stepped(_prepared(engine, fields))
            first = await while_connected(request, anext(run))
            if isinstance(first, Failure):
                raise ApiError.of(first)
            jobs.check_room(client)  # others may have come while this one's files did
            job = jobs.begin(mode.mode, (client, owner), first, run, stack.pop_all())
        facts = _told(job, request, kept)
        return JSONResponse(facts.model_dump(), 202, {"Location": address(request, f"jobs/{facts.id}")})

    @routes.get("/jobs", summary="The caller's jobs, without their previews")
    async def mine(request: Request) -> JobList:
        owner = request.state.owner
        if owner is None and not private:
            raise ApiError(403, NOT_LISTED, "not_listed")
        return JobList(data=[_told(job, request, kept) for job in jobs.of(owner)])

    @routes.get("/jobs/{id}", summary="How far a job is, or what has come of it", responses=lost)
    async def ask(request: Request, id: str) -> JobFacts:
        job = jobs.find(id, request.state.owner)
        return _told(job, request, kept).model_copy(update={"preview": job.preview and small(job.preview)})

    @routes.delete("/jobs/{id}", summary="Cancel a job, or remove one that has ended with its files", responses=lost)
    async def cancel(request: Request, id: str) -> JobFacts:
        job = jobs.find(id, request.state.owner)
        jobs.cancel(job)
        return _told(job, request, kept)

    return routes


def _prepared(engine: Engine, fields: dict[str, Any]) -> Iterator[Event | Made]:
    """Make a control image, beside the queue as on the page: it needs no model that draws."""
    try:
        asked = Preprocess.parse(**fields)
        yield Stage("preprocessing")
        control = engine.control_image(asked)
    except StudioError as error:
        yield Failure.of(error)
        return
    files = {"control.png": (control.png(), "image/png")}
    yield Made(files, {"digest": control.digest}, [str(names_only(note)) for note in control.notes])


def _made(result: Result) -> Made:
    """Return what a result is to a job: the picture, and its parameters as every other way gives them."""
    stem, parameters = metadata.file_stem(result.request), dict(result.sidecar)
    text = json.dumps(parameters, indent=2, ensure_ascii=False) + "\n"
    files = {f"{stem}.png": (result.png, "image/png"), f"{stem}.json": (text.encode(), "application/json")}
    return Made(files, parameters, [str(names_only(note)) for note in result.notes], result.request.seed)


def _told(job: Job, request: Request, kept: KeptFiles) -> JobFacts:
    """Return what is known of a job, with its files' addresses, and without the preview."""
    files = []
    for name, kept_name in job.files.items():
        if found := kept.find(kept_name):
            url = address(request, f"files/{kept_name}")
            files.append(JobFile(name=name, url=url, media_type=found.media_type, size=found.size))
    return job.facts.model_copy(update={"files": files})
