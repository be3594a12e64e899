"""Files that stopped or crashed the program once: read, or refused in a sentence. Each finding adds its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from core import metadata
from core.errors import RequestError
from core.upload import Upload
from images.reading import decode

CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())


@pytest.mark.timeout(60)  # each took minutes or hours
@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.name)
def test_a_hostile_file_is_read_or_refused(file: Path) -> None:
    try:
        metadata.read_picture(file).request()
    except RequestError as refused:
        assert len(str(refused)) < 500
    try:
        decode(Upload.open(file))
    except RequestError as refused:
        assert len(str(refused)) < 500
