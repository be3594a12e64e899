"""Standard output and standard error, whatever they lead to: a console of another encoding, a pipe that closes.

Python's own answers to these are tracebacks: at the first letter that an encoding lacks, and at the first line that
nobody reads any more.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator

from core.errors import NotWritten

# How a shell counts a program that a closed pipe ended: 128 and the number of SIGPIPE, also where there are no signals.
CLOSED_PIPE_EXIT_CODE = 128 + getattr(signal, "SIGPIPE", 13)

# What a system says where there is no room for what is printed.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Let what is printed meanwhile reach whatever reads it, or end the program without a traceback.

    Letters that the console's encoding lacks are written as escapes, such as `\\u732b`.

    Raises:
        SystemExit: nobody reads the output any more (CLOSED_PIPE_EXIT_CODE), or there is no room for it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            _flush()
    except BrokenPipeError:
        _discard()
        raise SystemExit(CLOSED_PIPE_EXIT_CODE) from None
    except OSError as error:
        if error.filename is not None or error.errno not in _NO_ROOM:
            raise
        _discard()
        failure = NotWritten("standard output", error.strerror or str(error))
        with contextlib.suppress(OSError):
            print(failure, file=sys.stderr, flush=True)
        raise SystemExit(failure.exit_code) from None


def takes_any_letter() -> bool:
    """Whether standard output is in an encoding that has every letter (UTF-8 and its like)."""
    encoding = getattr(sys.stdout, "encoding", None)
    return encoding is None or codecs.lookup(encoding).name.startswith("utf")


def _flush() -> None:
    """Write out what is held back, which Python would do after `main`, where nothing can be caught."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()


def _discard() -> None:
    """Let what a broken stream still holds go nowhere: Python tries to write it once more when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
