"""What programs get in place of an answer: a status and one sentence, in the shape that OpenAI's clients read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse

from core.errors import GpuBusy, GpuQuota, InternalError, QueueFull, RequestError, StudioError
from core.events import Failure
from web.client_limits import QUEUE_SECONDS
from web.names_only import names_only

log = logging.getLogger(__name__)

_MAY_RETRY = {kind.code for kind in (QueueFull, GpuBusy, GpuQuota)}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ErrorFacts(BaseModel):
    """Why there is no answer.

    Attributes:
        message: one sentence: what is wrong, and what to do.
        type: the kind of error, as OpenAI has them.
        param: the field that is wrong, where it is one.
        code: what a program branches on.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """Every answer that is none."""

    error: ErrorFacts


class ApiError(Exception):
    """A request of a program is refused, or has failed."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @classmethod
    def of(cls, failure: Failure | Exception) -> ApiError:
        """Return what a failed run, or an error, is to a program; an error that nobody foresaw is logged."""
        if isinstance(failure, ApiError):
            return failure
        if isinstance(failure, Exception) and not isinstance(failure, StudioError):
            log.error("internal error", exc_info=failure)
            failure = InternalError(type(failure).__name__, str(failure))
        if isinstance(failure, StudioError):
            failure = Failure.of(failure)
        failure = names_only(failure)
        field = failure.values.get("field") if failure.code == RequestError.code else None
        if failure.code in _MAY_RETRY:
            headers = {"Retry-After": str(QUEUE_SECONDS)}
        else:  # a client tries again by itself where the status is 500 or more, and this would fail again
            headers = {"x-should-retry": "false"} if failure.http_status >= 500 else {}
        return cls(failure.http_status, failure.text, failure.code, field, headers)

    @property
    def facts(self) -> dict[str, Any]:
        """What the answer holds, as `ErrorAnswer`."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}

    def response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse({"error": self.facts}, self.status, self.headers)


def of_status(status: int, message: str, headers: Mapping[str, str] | None = None) -> ApiError:
    """Return the error of an HTTP status, its name as the code."""
    return ApiError(status, message, HTTPStatus(status).phrase.lower().replace(" ", "_"), None, headers)


RESPONSES: dict[int | str, dict[str, Any]] = {  # what every route may answer besides, for the OpenAPI document
    status: {"model": ErrorAnswer, "description": why}
    for status, why in {
        400: "A field has an impossible value: the sentence names it, its value and what is allowed.",
        401: "The server asks for an API key.",
        403: "The routes are closed, or a page of another site asks.",
        404: "There is none of that name.",
        413: "The request is too large.",
        429: "Too many requests wait already: Retry-After says when to ask again.",
        500: "A fault of the server's, or of what it was given to draw with.",
        503: "Weights, memory or a GPU are missing.",
    }.items()
}
