"""Whose files are whose: what only closed pages have used goes, what is too old too, and nothing else."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from gradio_client import Client, handle_file

from tests.helpers.pictures import png
from tests.helpers.serving import ROOT, Server, server
from web import visits
from web.own_files import KEEP
from web.visits import LEFT

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a file that is locked cannot be removed there")

IN_A_HURRY = f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from core import environment
environment.prepare_environment(os.environ)
from web import visits
visits.LOOK, visits.LEFT = 0.05, 0.0
runpy.run_path("cli.py", run_name="__main__")
"""


@pytest.fixture
def in_a_hurry(tmp_path: Path) -> Server:
    """A server that keeps its files in `tmp_path`, and removes those of closed pages at once."""
    (tmp_path / "serve.py").write_text(IN_A_HURRY)
    environment = ("GRADIO_TEMP_DIR", str(tmp_path / "cache")), ("TMPDIR", str(tmp_path))
    return server(environment=environment, program=str(tmp_path / "serve.py"))


@contextmanager
def open_page(running: Server, session: str) -> Iterator[Client]:
    """Hold a session open, as a browser does, and yield what calls in it."""
    client = Client(running.url, verbose=False, download_files=False)
    client.session_hash = session
    with httpx.stream("GET", f"{running.url}gradio_api/heartbeat/{session}", timeout=60) as heartbeat:
        lines = heartbeat.iter_lines()  # which would close the connection if it were dropped
        assert "ALIVE" in next(lines)
        yield client
    client.close()


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_files_go_after_the_last_visitor_who_used_them(in_a_hurry: Server, tmp_path: Path) -> None:
    both, one, more = (
        png(tmp_path / f"{name}.png", parameters=f"{name}\nSteps: 4") for name in ("both", "one", "more")
    )
    with open_page(in_a_hurry, "stays") as stays:
        with open_page(in_a_hurry, "leaves") as leaves:
            for client, path in ((stays, both), (leaves, both), (leaves, one)):
                client.predict(handle_file(path), api_name="/inspect")
            drawn = leaves.predict("a fox", steps=1, seed=7, api_name="/generate")
            picture = Path(drawn[0]["path"])
            beside = picture.with_suffix(".large.webp")  # as web.enlarged puts it there
            beside.write_bytes(b"x")
            (upload,), (shared,) = tmp_path.glob("cache/*/one.png"), tmp_path.glob("cache/*/both.png")
            stays.predict(handle_file(more), api_name="/inspect")
            assert [file for file in (upload, picture, beside, shared) if not file.exists()] == []
        wait_until(lambda: not (upload.parent.exists() or picture.parent.exists()))
        assert shared.exists()
    wait_until(lambda: not shared.exists())

    (lock,) = tmp_path.glob("z-image-studio-*/*/lock")  # a cleaner of temporary files takes the server's folder
    shutil.rmtree(lock.parent, ignore_errors=True)  # the server may make it again at once
    wait_until(lock.exists)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that lies where Gradio keeps what visitors send."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    kept = tmp_path / ("a" * 64) / "file.png"
    kept.parent.mkdir()
    kept.write_text("x")
    return kept


def test_what_is_too_old_goes_whoever_looks_at_it(file: Path) -> None:
    clock = [time.time()]
    seen = visits.Visits(lambda: clock[0])
    noted = {str(file), "another"}
    with seen.open("someone"):
        seen.use("someone", [{"value": {"path": str(file)}}])
        clock[0] += KEEP - 1
        seen.sweep([noted])
        assert file.exists()
        with seen.open("made up"):
            pass
        assert "made up" not in seen._last
        clock[0] += 3
        seen.sweep([noted])
        assert not file.parent.exists()
        assert noted == {"another"}


def test_what_somebody_sent_again_stays(file: Path) -> None:
    """Gradio keeps a file by what is in it, so one that was sent twice lies there once."""
    clock = [time.time()]
    seen = visits.Visits(lambda: clock[0])
    with seen.open("gone"):
        seen.use("gone", {"path": str(file)})
    clock[0] += LEFT - 1
    seen.sweep()
    file.write_text("x")  # its time is that of the machine, which the clock is ahead of by less than LEFT
    clock[0] = time.time() + LEFT - 1
    seen._last["gone"] = 0
    seen.sweep()
    assert file.exists()
    clock[0] += 3
    seen.sweep()
    assert not file.exists()


def test_a_visitor_cannot_have_removed_what_is_no_file_of_a_visitors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is used is what was sent, by anybody."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    name = "0" * 64
    places = [tmp_path / name, tmp_path / "cache" / "studio-kept", tmp_path / "cache" / "1"]
    places.append(tmp_path / "cache" / name / name)
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        (place / "file").write_text("x")
    clock = [time.time()]
    seen = visits.Visits(lambda: clock[0])
    with seen.open("someone"):
        sent = [{"path": str(place / "file")} for place in places]
        seen.use("someone", {"data": [sent, {"path": f"{tmp_path}/cache/1/../../{name}/x"}, {"path": 7}, None]})
    clock[0] += KEEP + LEFT + 1
    seen.sweep()
    assert all((place / "file").exists() for place in places)
    assert not seen._used
