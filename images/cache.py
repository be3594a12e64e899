"""The control images of the last requests, made one at a time: what was shown is what is drawn with."""

from __future__ import annotations

import threading
from typing import NamedTuple

from cachetools import LRUCache

from core.request import Preprocess
from core.sizes import ImageSizes
from core.upload import Upload
from images import preprocess

KEPT_BYTES = 64 << 20  # of 3 MB each at 1024 x 1024, 12 MB at most: one or two for every visitor of a busy page


class _Key(NamedTuple):
    """All that a control image depends on."""

    digest: str
    preprocessor: str
    thresholds: tuple[int, ...]
    sizes: ImageSizes

    @classmethod
    def of(cls, request: Preprocess, upload: Upload, sizes: ImageSizes) -> _Key:
        low_high = (request.canny_low, request.canny_high) if request.preprocessor == "canny" else ()
        return cls(upload.digest, request.preprocessor, low_high, sizes)


def _bytes_of(control: preprocess.Control) -> int:
    return control.image.width * control.image.height * len(control.image.getbands())


class Controls:
    """The control images of the last requests."""

    def __init__(self) -> None:
        self._kept: LRUCache[_Key, preprocess.Control] = LRUCache(KEPT_BYTES, getsizeof=_bytes_of)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, request: Preprocess, upload: Upload, sizes: ImageSizes) -> preprocess.Control:
        """Return a request's control image for weights that draw these sizes; make it where it is not there.

        Raises:
            RequestError: the image cannot be used.
            WeightsMissing: the preprocessor's model is not on this machine.
        """
        key = _Key.of(request, upload, sizes)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = preprocess.control(request, upload, sizes)
            return self._kept[key]

    def unlock(self) -> None:
        """Replace the lock in a fork, where the thread that may hold it does not exist."""
        self._lock = threading.Lock()
