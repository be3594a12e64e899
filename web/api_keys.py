"""The keys of programs: given, read from a file or the environment, and compared so that nothing is learnt of them.

Only their digests are kept: nothing that is printed or logged can hold a key.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from core.errors import RequestError

VARIABLE = "Z_IMAGE_API_KEYS"  # keys, with spaces, commas or new lines between them
ALLOWED = "keys of 8 to 200 letters, digits and signs, without spaces and commas"


class ApiKeys:
    """The keys that programs may show; without any, `bool` is False.

    Raises:
        RequestError: one is too short, too long or has a space; it is not repeated.
    """

    def __init__(self, keys: Iterable[str] = (), field: str = "api_key") -> None:
        self._digests = [_digest(_checked(key, field)) for key in keys]

    @classmethod
    def collect(
        cls, given: Sequence[str] = (), file: str | None = None, environ: Mapping[str, str] = os.environ
    ) -> ApiKeys:
        """Return the keys that are given, those of a file (one a line; `#` begins a comment) and of the environment.

        Raises:
            RequestError: a key is malformed, or the file cannot be read or holds none.
        """
        keys = cls(given)
        if file is not None:
            keys._digests += cls(_lines(file), "api_keys")._digests
        keys._digests += cls(filter(None, re.split(r"[\s,]+", environ.get(VARIABLE, ""))), VARIABLE)._digests
        return keys

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, authorization: str) -> str | None:
        """Return a name for who sends this Authorization header, the same for the same key; None for no such key.

        All keys are compared, each in constant time.
        """
        scheme, _, key = authorization.partition(" ")
        shown = _digest(key.strip())
        known = [hmac.compare_digest(shown, digest) for digest in self._digests]
        return f"key {shown.hex()[:16]}" if scheme.lower() == "bearer" and any(known) else None


def _lines(file: str) -> list[str]:
    allowed = "a file that can be read, with one key a line"
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise RequestError("api_keys", file, allowed) from error
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not keys:
        raise RequestError("api_keys", file, allowed)
    return keys


def _checked(key: str, field: str) -> str:
    if not re.fullmatch(r"[!-+\--~]{8,200}", key):
        raise RequestError(field, "***", ALLOWED)  # not repeated: it may be a key
    return key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
