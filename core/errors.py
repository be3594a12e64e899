"""The tree of this project's errors: what went wrong, in one sentence, and what each front answers with.

    StudioError              anything we raise on purpose; `exit_code` for the command line, `http_status` for HTTP
    ├── UserError            the user can change something and try again
    │   ├── RequestError     a field of the request has an impossible value
    │   ├── WeightsMissing   the files that a mode needs are not on this machine
    │   ├── DownloadError    weights could not be fetched
    │   ├── OutOfMemory      the device or the host ran out of memory
    │   │   └── SpaceOutOfMemory the same on a Space, whose visitor can only ask for less
    │   ├── BrokenPicture    what came out is no picture: NaN, black, flat or clipped
    │   ├── NotWritten       a file could not be written
    │   ├── QueueFull        too many requests are waiting already
    │   ├── GpuRefused       a Space gives this visitor no GPU for this request
    │   │   ├── GpuQuota     their quota does not cover it
    │   │   ├── GpuBusy      none is free
    │   │   ├── GpuAborted   it was taken back before the picture was done
    │   │   └── GpuNoVisitor nobody's quota comes with the request
    │   └── Cancelled        somebody stopped the request
    └── InternalError        a fault of ours; the log has the details

Every error carries a `Message`, which a front words in its reader's language; `str(error)` is the English sentence.
"""

from __future__ import annotations

import os.path
from typing import Any, ClassVar

from core.messages import Message


class StudioError(Exception):
    """Base of the tree.

    Args:
        text: the English template of the sentence, or a message that is whole.
        **values: what belongs into the template.

    Attributes:
        message: the sentence; a template becomes a message with the error's own `code`.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, text: str | Message, /, **values: Any) -> None:
        self.message = text if isinstance(text, Message) else Message(self.code, text, **values)
        super().__init__(str(self.message))

    @classmethod
    def known(cls, code: str, message: Message) -> StudioError:
        """Return the error of a code with its whole message."""
        classes = [cls]
        for known in classes:
            classes += known.__subclasses__()
        kind = next((known for known in classes if known.code == code), StudioError)
        error = kind.__new__(kind)
        StudioError.__init__(error, message)
        return error

    @property
    def values(self) -> dict[str, Any]:
        """The facts that the sentence is made of, by name."""
        return dict(self.message.values)


class UserError(StudioError):
    """The user can change something and try again."""

    code = "user_error"
    http_status = 400


class RequestError(UserError):
    """A field has an impossible value.

    Args:
        field: the field's name in the request, for example `width`.
        value: what was given.
        allowed: what would have been possible, as a phrase that follows "allowed:".
        nearest: the nearest possible value where there is one; a front may offer it as a button.
    """

    code = "bad_request"
    exit_code = 2
    http_status = 400

    def __init__(self, field: str, value: Any, allowed: str | Message, nearest: Any = None) -> None:
        text = "{field}: {value} is not possible; allowed: {allowed}"
        if nearest is not None:
            text += "; the nearest is {nearest}"
        super().__init__(text, field=field, value=_shown(value), allowed=allowed, nearest=nearest)


def _shown(value: Any) -> str:
    """Return a value for a sentence, cut to 80 characters; a long path to its last name."""
    if isinstance(value, str) and len(value) > 78 and os.path.isabs(value):
        value = f"\N{HORIZONTAL ELLIPSIS}/{os.path.basename(value)}"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists thousands deep in each other
        text = f"this {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


class WeightsMissing(UserError):
    """Files that the request needs are not on this machine; the sentence names them, their size and the command."""

    code = "weights_missing"
    exit_code = 3
    http_status = 503


class DownloadError(UserError):
    """Weights could not be fetched; the sentence says why and what to do. What has arrived is kept."""

    code = "download_failed"
    http_status = 503


class OutOfMemory(UserError):
    """The device or the host ran out of memory; the sentence says what to change."""

    code = "out_of_memory"
    exit_code = 4
    http_status = 503


class SpaceOutOfMemory(OutOfMemory):
    """A Space ran out of memory: its visitor has no other programs to close, and no flags to start it with."""

    code = "space_out_of_memory"

    def __init__(self) -> None:
        super().__init__(
            "this picture needs more memory than the Space has; ask for a smaller one, or draw without a LoRA"
        )


class BrokenPicture(UserError):
    """What came out is no picture, also in safe mode; the sentence says what was seen and the likely cause."""

    code = "broken_picture"
    http_status = 500


class NotWritten(UserError):
    """A file could not be written, and is as it was; `reason` is what the system says."""

    code = "not_written"
    http_status = 507

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(
            "{path} could not be written ({reason}): make room on the disk, or choose another folder",
            path=path,
            reason=reason,
        )


class QueueFull(UserError):
    """Too many requests are waiting already."""

    code = "queue_full"
    http_status = 429

    def __init__(self, limit: int) -> None:
        super().__init__("{limit} requests are waiting already; try again in a moment", limit=limit)


class GpuRefused(UserError):
    """A Space gives this visitor no GPU for this request; the sentence says what they can do."""

    code = "gpu_refused"
    http_status = 503


class GpuQuota(GpuRefused):
    """The visitor's quota does not cover the request."""

    code = "gpu_quota"
    http_status = 429


class GpuBusy(GpuRefused):
    """No GPU was free in time."""

    code = "gpu_busy"


class GpuAborted(GpuRefused):
    """The GPU was taken back before the picture was done."""

    code = "gpu_aborted"


class GpuNoVisitor(GpuRefused):
    """The request came by a way that brings no visitor's quota along."""

    code = "gpu_no_visitor"

    def __init__(self) -> None:
        super().__init__(
            "on this Space a picture is drawn on the quota of whoever asks for it, which this way of asking does not "
            "bring along; call the named endpoints instead, with gradio_client and a Hugging Face token"
        )


class Cancelled(UserError):
    """Somebody stopped the request before it was done."""

    code = "cancelled"
    exit_code = 130
    http_status = 499  # nginx's "client closed request": HTTP itself has no number for it

    def __init__(self) -> None:
        super().__init__("the request was cancelled")


class InternalError(StudioError):
    """A fault of ours: `kind` is the class of the exception behind it."""

    code = "internal"

    def __init__(self, kind: str, detail: str) -> None:
        text = "something went wrong inside ({kind}: {detail}); the log has the details"
        super().__init__(text, kind=kind, detail=detail)
