"""OpenAI's image routes: the fields that its clients send become a request of ours, and events become its answers."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack, aclosing, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import AfterValidator, BaseModel, Field
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse

from core.errors import RequestError, StudioError
from core.events import Event, Failure, Preview, Queued, Result, Step
from core.request import (
    MODELS,
    Cfg,
    Checked,
    ControlNet,
    DrawRequest,
    Preprocessor,
    Prompt,
    Seed,
    Steps,
    TextToImage,
    Threshold,
)
from engine import Engine
from hub import fine_tunes, parts
from web import bodies, own_files
from web.api_errors import RESPONSES, ApiError
from web.following import begin, unheld, while_connected
from web.image_formats import Format, emerging, encoded, media_type, size_of
from web.kept_files import KEPT_SECONDS, KeptFiles, address

MOST_PICTURES = 10  # of one request, as OpenAI has it
MOST_PARTIAL = 3  # the same
NO_FILE = "there is no file at this address: they hold for an hour, or less where much comes"

# What JSON with pictures in it is sent as: it hardly gets smaller, and packing it would hold up everybody else.
UNPACKED = {"content-encoding": "identity"}

_ON_OFF: dict[str, Any] = {"allowed": "true or false"}


def _possible_size(size: str) -> str:
    if size != "auto" and not re.fullmatch(r"\d{1,5}x\d{1,5}", size):
        raise ValueError("no size")
    return size


class Images(Checked):
    """What both routes take. `quality` and what follows it mean nothing here, and are taken as clients send them."""

    prompt: Prompt
    model: str = Field("turbo", max_length=300, description="One of GET /v1/models.")
    n: int = Field(1, ge=1, le=MOST_PICTURES, description="How many pictures, with one seed after the other.")
    response_format: Literal["b64_json", "url"] = Field(
        "b64_json", description="The picture itself, or an address that it can be fetched from for an hour."
    )
    output_format: Format = Field("png", description="PNG has all parameters inside, the others the main ones.")
    output_compression: int = Field(
        100, ge=0, le=100, description="Quality of JPEG and WebP; a WebP of 100 keeps every pixel."
    )
    stream: bool = Field(False, description="Server-sent events in place of one answer.", json_schema_extra=_ON_OFF)
    partial_images: int = Field(
        0, ge=0, le=MOST_PARTIAL, description="With stream: how often to send how a picture looks so far."
    )
    seed: Seed = 0
    num_inference_steps: Steps = None
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto", "low"] = "auto"
    user: str = Field("", max_length=1000)
    safety_identifier: str = Field("", max_length=1000)

    def fields(self) -> dict[str, Any]:
        """Return the fields of a request of ours, unchecked."""
        return {"prompt": self.prompt, "seed": self.seed, "steps": self.num_inference_steps}


class Generation(Images):
    """A picture of a prompt."""

    size: Annotated[str, AfterValidator(_possible_size)] = Field(
        "auto",
        max_length=11,
        description="Width and height in pixels; auto is the native size.",
        json_schema_extra={"allowed": "auto, or WIDTHxHEIGHT such as 1024x768"},
    )
    style: Literal["vivid", "natural"] = "vivid"
    negative_prompt: str = TextToImage.model_fields["negative_prompt"]  # type: ignore[assignment]
    guidance_scale: Cfg = None
    variety: float = TextToImage.model_fields["variety"]  # type: ignore[assignment]

    def fields(self) -> dict[str, Any]:
        """Return the fields of a text to image."""
        width, height = (None, None) if self.size == "auto" else map(int, self.size.split("x"))
        own = {"width": width, "height": height, "negative_prompt": self.negative_prompt}
        return super().fields() | own | {"cfg": self.guidance_scale, "variety": self.variety}


class Edit(Images):
    """A picture that keeps the structure of another."""

    image: str = Field(max_length=4_096, description="The picture whose structure is kept.")
    size: Literal["auto"] = Field("auto", description="The picture has the shape of `image`.")
    input_fidelity: Literal["high", "low"] = "high"
    preprocessor: Preprocessor = ControlNet.model_fields["preprocessor"]  # type: ignore[assignment]
    scale: float = ControlNet.model_fields["scale"]  # type: ignore[assignment]
    canny_low: Threshold = ControlNet.model_fields["canny_low"]  # type: ignore[assignment]
    canny_high: Threshold = ControlNet.model_fields["canny_high"]  # type: ignore[assignment]

    def fields(self) -> dict[str, Any]:
        """Return the fields of a ControlNet request."""
        own = ("image", "preprocessor", "scale", "canny_low", "canny_high")
        return super().fields() | {name: getattr(self, name) for name in own}


class ModelFacts(BaseModel):
    """A model that draws."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The models that draw here."""

    object: Literal["list"] = "list"
    data: list[ModelFacts]


class Picture(BaseModel):
    """A finished picture: itself or its address, and the seed that draws it again."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class Pictures(BaseModel):
    """What comes of a request."""

    created: int
    data: list[Picture]
    output_format: Format
    size: str
    quality: str = "auto"
    background: Literal["opaque"] = "opaque"


class Sent(Checked):
    """A file that is sent once, and then named by its address."""

    file: str = Field(min_length=1, max_length=4_096, description="A picture, or a LoRA file of up to 100 MB.")
    purpose: str = Field("user_data", max_length=100, description="Taken as clients send it.")


class SentFile(BaseModel):
    """A file that was sent, as OpenAI has them, with its address."""

    id: str
    url: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


_CALLED = {"steps": "num_inference_steps", "cfg": "guidance_scale", "width": "size", "height": "size"}

# Its clients expect it; nothing is counted here.
USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}

MASK = "a mask is not possible: no part of a picture is drawn again here; the whole of it keeps the image's structure"


def router(engine: Engine, kept: KeptFiles) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(responses=RESPONSES, tags=["images"])
    born = int(time.time())

    @routes.get("/models", summary="The models that draw here")
    async def models() -> ModelList:
        names = await asyncio.to_thread(model_names, engine)
        return ModelList(data=[ModelFacts(id=name, created=born, owned_by=owner) for name, owner in names.items()])

    @routes.get("/models/{name:path}", summary="One of the models")
    async def model(name: str) -> ModelFacts:
        names = await asyncio.to_thread(model_names, engine)
        if name not in names:
            raise _unknown(name, names)
        return ModelFacts(id=name, created=born, owned_by=names[name])

    @routes.post(
        "/images/generations",
        summary="Draw a picture of a prompt",
        response_model=Pictures,
        openapi_extra=bodies.described({"application/json": [Generation]}),
    )
    async def generations(request: Request) -> Response:
        return await _answer(request, Generation, TextToImage, "image_generation")

    @routes.post(
        "/images/edits",
        summary="Draw a picture that keeps the structure of another",
        response_model=Pictures,
        openapi_extra=bodies.described({"multipart/form-data": [Edit]}, files=("image",)),
    )
    async def edits(request: Request) -> Response:
        return await _answer(request, Edit, ControlNet, "image_edit")

    @routes.get("/files/{name}", summary="A picture by its address", response_class=FileResponse)
    async def file(name: str) -> Response:
        found = kept.find(name)
        if found is None:
            raise ApiError(404, NO_FILE, "file_not_found")
        return FileResponse(found.path, media_type=found.media_type)

    @routes.post(
        "/files",
        summary="Send a file, which an address then stands for",
        openapi_extra=bodies.described({"multipart/form-data": [Sent]}, files=("file",)),
    )
    async def send(request: Request) -> SentFile:
        with own_files.for_a_request() as folder:
            fields = await bodies.read(request, Path(folder), ("file",))
            path = Path(Sent.parse(**fields).file)
            data = await asyncio.to_thread(path.read_bytes)
        suffix = path.suffix.lower() if re.fullmatch(r"\.[a-z0-9]{1,12}", path.suffix.lower()) else ""
        name = await asyncio.to_thread(kept.keep, data, suffix, "application/octet-stream")
        now = int(time.time())
        return SentFile(
            id=name,
            url=address(request, f"files/{name}"),
            bytes=len(data),
            created_at=now,
            expires_at=now + KEPT_SECONDS,
            filename=path.name,
            purpose=fields.get("purpose") or "user_data",
        )

    async def _answer(request: Request, taken: type[Images], mode: type[DrawRequest], event: str) -> Response:
        with ExitStack() as stack:
            folder = stack.enter_context(own_files.for_a_request())
            fields = await bodies.read(request, Path(folder), ("image", "mask") if mode.files else ())
            if "mask" in fields:
                raise ApiError(400, MASK, "mask_refused", "mask")
            asked = taken.parse(**{name: value for name, value in fields.items() if value is not None})
            model = await asyncio.to_thread(_chosen, engine, mode, asked.model)
            run = begin(engine, request, mode, asked.fields() | model, asked.n)
            if not asked.stream:
                return await while_connected(request, _whole(request, run, asked, kept))
            first = await while_connected(request, anext(run))
            if isinstance(first, Failure):
                raise _failed(first)
            stream = _streamed(unheld(first, run), asked, event, stack.pop_all())
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    return routes


async def _whole(request: Request, run: AsyncGenerator[Event], asked: Images, kept: KeptFiles) -> Response:
    """Return all pictures of a run in one answer."""
    pictures: list[Picture] = []
    size = ""
    async with aclosing(run):
        async for event in run:
            if isinstance(event, Failure):
                raise _failed(event)
            if isinstance(event, Result):
                size, seed = _size(event.size), event.request.seed
                data = await asyncio.to_thread(encoded, event.png, asked.output_format, asked.output_compression)
                if asked.response_format == "url":
                    form = asked.output_format
                    name = await asyncio.to_thread(kept.keep, data, f".{form}", media_type(form))
                    pictures.append(Picture(url=address(request, f"files/{name}"), seed=seed))
                else:
                    pictures.append(Picture(b64_json=base64.b64encode(data).decode(), seed=seed))
    answer = Pictures(created=int(time.time()), data=pictures, output_format=asked.output_format, size=size)
    return JSONResponse(answer.model_dump(exclude_none=True), headers=UNPACKED)


async def _streamed(run: AsyncGenerator[Event], asked: Images, kind: str, held: ExitStack) -> AsyncGenerator[str]:
    """Yield a run as server-sent events, and let go what is `held` for it."""
    sent, told = 0, ""
    with held:
        try:
            async with aclosing(run):
                async for event in run:
                    match event:
                        case Queued(ahead) if told != f": {ahead} before this one\n\n":
                            told = f": {ahead} before this one\n\n"  # a comment, which keeps proxies from hanging up
                            yield told
                        case Step(at, total, Preview() as preview) if _is_due(at, total, sent, asked.partial_images):
                            data = await asyncio.to_thread(emerging, preview, asked.output_format)
                            size = _size(size_of(preview))
                            yield _event(f"{kind}.partial_image", asked, data, size, partial_image_index=sent)
                            sent += 1
                        case Result():
                            how = asked.output_format, asked.output_compression
                            data = await asyncio.to_thread(encoded, event.png, *how)
                            more: dict[str, Any] = {"seed": event.request.seed, "usage": USAGE}
                            yield _event(f"{kind}.completed", asked, data, _size(event.size), **more)
                            sent = 0
                        case Failure():
                            raise _failed(event)
        except Exception as error:  # an answer that has begun, with 200, has no other place for it
            facts = ApiError.of(error).facts
            yield f"event: error\ndata: {json.dumps({'type': 'error', 'error': facts})}\n\n"


def _failed(failure: Failure) -> ApiError:
    """Return a failure with the field that it is about, as these routes call it."""
    error = ApiError.of(failure)
    error.param = _CALLED.get(error.param or "", error.param)
    return error


def _is_due(index: int, total: int, sent: int, wanted: int) -> bool:
    """Whether to send how the picture looks after a step: so many times, evenly spread, and not after the last."""
    return sent < wanted and index < total and index * (wanted + 1) >= (sent + 1) * total


def _event(name: str, asked: Images, data: bytes, size: str, **more: Any) -> str:
    facts = {
        "type": name,
        "b64_json": base64.b64encode(data).decode(),
        "created_at": int(time.time()),
        "size": size,
        "quality": "auto",
        "background": "opaque",
        "output_format": asked.output_format,
        **more,
    }
    return f"event: {name}\ndata: {json.dumps(facts)}\n\n"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def model_names(engine: Engine) -> dict[str, str]:
    """Return whose the models are that can draw here, by name: the published ones, and fine-tunes that are found."""
    names: dict[str, str] = {}
    for model in MODELS:
        with suppress(StudioError):
            kind = engine.weights_in_use(TextToImage.mode, model).kind
            names[model] = "z-image-studio" if kind == "mini" else "Tongyi-MAI"
    return names | dict.fromkeys(fine_tunes.found(), "user")


def _chosen(engine: Engine, mode: type[DrawRequest], name: str) -> dict[str, str]:
    """Return the fields of a request that a model's name stands for.

    Raises:
        ApiError: there is none of that name.
        RequestError: this mode does not run with it.
    """
    names = model_names(engine)
    for model in MODELS:
        repo = parts.PARTS[model].repo
        if name.lower() in (model, repo.lower(), repo.lower().rpartition("/")[2]):
            if "model" in mode.model_fields:
                return {"model": model}
            if model != mode.usual_model():
                raise RequestError("model", name, mode.usual_model())
            return {}
    if name not in names:
        raise _unknown(name, names)
    return {"checkpoint": name}


def _unknown(name: str, names: Mapping[str, str]) -> ApiError:
    text = f"there is no model {name[:100]!r} here; there are {', '.join(names)}"
    return ApiError(404, text, "model_not_found", "model")
