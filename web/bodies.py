"""What a program sends: JSON, or a form with files, read up to a limit and written where the engine finds files."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.types import Message

from core import bounded
from core.errors import NotWritten, RequestError
from web.api_errors import ApiError
from web.clients import announced_length
from web.upload_limits import KEPT_FREE, MAX_PICTURE

MAX_JSON = 4_000_000  # bytes: a prompt of the longest kind, or a picture of three million bytes as a data URL
ONE, NO_FILE = "one", "no file"
WITH_REQUEST = "a file that comes with the request: a part of multipart/form-data, or a data URL in base64"
MAX_NAME = 200  # bytes of a file's name; most systems take 255

_DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?P<rest>(?:;[^;,]*)*);base64,", re.ASCII)
_NAME_IN_URL = re.compile(r";name=([^;,]+)")


def described(kinds: Mapping[str, Sequence[type[BaseModel]]], files: Collection[str] = ()) -> dict[str, Any]:
    """Return how an OpenAPI document describes a route's body: by content type, one of some types.

    A type with a `mode` has it as a field; `files` are the fields that are files.
    """
    content = {}
    for kind, models in kinds.items():
        schemas = [_schema(model, files, kind == "multipart/form-data") for model in models]
        content[kind] = {"schema": schemas[0] if len(schemas) == 1 else {"oneOf": schemas}}
    refused = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
    responses = {
        "415": {"description": "A body of this kind is not read here.", "content": refused},
        "507": {"description": "There is no room for its files.", "content": refused},
    }
    return {"requestBody": {"required": True, "content": content}, "responses": responses}


def _schema(model: type[BaseModel], files: Collection[str], form: bool) -> dict[str, Any]:
    schema = model.model_json_schema()
    for name, field in schema["properties"].items():
        for ours in ("allowed", "flag", "metavar"):  # for the command line, and for sentences
            field.pop(ours, None)
        if name in files:
            text = field.get("description", "")
            if form:
                field = {"contentMediaType": "application/octet-stream", "description": text}
            else:
                field = {"pattern": "^data:.*;base64,", "description": f"{text} In a data URL."}
            schema["properties"][name] = {"type": "string"} | field
    if mode := getattr(model, "mode", None):
        schema["title"] = mode
        schema["properties"] = {"mode": {"const": mode, "type": "string"}} | schema["properties"]
        schema["required"] = ["mode", *schema.get("required", ())]
    return schema


async def read(request: Request, folder: Path, files: Collection[str], most: int = MAX_PICTURE) -> dict[str, Any]:
    """Return what a program sends: its fields, those that are files as the paths where they lie now.

    Args:
        request: its body was not read yet.
        folder: where files are written, each in a folder of its own so that it keeps its name.
        files: the fields that are files: parts of a form, or data URLs. Whatever else stands there is refused.
        most: how many bytes a form may have; each file but a LoRA may have MAX_PICTURE.

    Raises:
        ApiError: it is too large, or neither JSON nor a form.
        NotWritten: there is no room for it.
        RequestError: a file is none.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        if announced_length(request.headers) > max(MAX_PICTURE, shutil.disk_usage(folder).free - KEPT_FREE):
            raise NotWritten("the request", "there is no room")
        return await _form(_limited(request, most), folder, files)
    if kind != "application/json":
        raise ApiError(415, f"{kind} is not read here; send application/json or multipart/form-data", "content_type")
    return await _json(_limited(request, MAX_JSON), folder, files)


def _limited(request: Request, most: int) -> Request:
    """Return the request with a body that ends in a refusal where it is larger; one that says so is not begun."""
    refused = ApiError(
        413,
        f"the request is larger than {most} bytes"
        + ("; send a picture as a file, in multipart/form-data" if most == MAX_JSON else ""),
        "too_large",
        headers={"Connection": "close"},  # or the server would read what is still to come
    )
    if announced_length(request.headers) > most:
        raise refused
    arrived = 0

    async def receive() -> Message:
        nonlocal arrived
        message = await request.receive()
        arrived += len(message.get("body", b""))
        if arrived > most:
            raise refused
        return message

    return Request(request.scope, receive)


async def _json(request: Request, folder: Path, files: Collection[str]) -> dict[str, Any]:
    try:
        body = await request.body()
        fields = bounded.loads(body.decode(json.detect_encoding(body)))
    except ValueError as error:
        raise ApiError(400, "the body is not JSON", "not_json") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is JSON, but no object with fields", "not_json")
    if strange := [name for name in fields if not name.isprintable()]:  # pydantic cannot name half a character
        raise ApiError(400, f"there is no field {strange[0][:100]!a}", "unknown_field")
    for name in set(files) & fields.keys():
        if fields[name]:
            fields[name] = await asyncio.to_thread(from_data_url, fields[name], name, folder)
    return fields


async def _form(request: Request, folder: Path, files: Collection[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    async with request.form(max_files=4, max_fields=64) as form:
        for key, value in form.multi_items():
            name = key.removesuffix("[]")  # clients write so what may be several
            if name in fields:
                raise RequestError(name, "more than one", ONE)
            if isinstance(value, UploadFile):
                if name not in files:
                    raise RequestError(name, value.filename, NO_FILE)
                if name != "lora" and (value.size or 0) > MAX_PICTURE:
                    raise ApiError(413, f"{name} is larger than {MAX_PICTURE} bytes", "too_large", name)
                fields[name] = await asyncio.to_thread(_placed, value.file, value.filename or "", name, folder)
            else:
                fields[name] = value
                if name in files and value:
                    fields[name] = await asyncio.to_thread(from_data_url, value, name, folder)
    return fields


def from_data_url(url: object, field: str, folder: Path, allowed: str = WITH_REQUEST) -> str:
    """Write what a data URL holds; nothing else is opened, neither a file of this machine nor another address.

    Raises:
        RequestError: it is none; `allowed` says what is.
    """
    found = _DATA_URL.match(url) if isinstance(url, str) else None
    if found is None or not isinstance(url, str):
        raise RequestError(field, url, allowed)
    try:
        data = base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(field, url[:60], allowed) from error
    named = _NAME_IN_URL.search(found["rest"])
    subtype = (found["type"] or "").partition("/")[2].partition("+")[0]
    name = named[1] if named else f"{field}.{subtype if subtype.isalnum() else 'bin'}"
    with (folder / "data").open("w+b") as file:
        file.write(data)
        file.seek(0)
        return _placed(file, name, field, folder)


def _placed(file: BinaryIO, filename: str, field: str, folder: Path) -> str:
    """Copy a file to where it keeps its name, which a picture remembers; return the path."""
    bare = "".join(letter for letter in re.split(r"[/\\]", filename)[-1] if letter.isprintable())
    name = bare.encode()[-MAX_NAME:].decode(errors="ignore").strip() if bare.strip(". ") else field
    path = folder / field / name
    try:
        path.parent.mkdir()
        with path.open("wb") as copy:
            shutil.copyfileobj(file, copy)
    except (OSError, ValueError) as error:
        raise NotWritten(name, getattr(error, "strerror", None) or str(error)) from error
    return str(path)
