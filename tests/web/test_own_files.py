"""The files that a real server keeps, and what is left of them when it is stopped or killed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import httpx
import pytest

import web.server
from core.errors import NotWritten, RequestError
from engine import Engine
from tests.helpers.api_server import api_server
from tests.helpers.serving import Server, server
from web import own_files

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals, users and permissions")


def uploaded(running: Server) -> Path:
    """Upload a file to a server; return where it keeps it."""
    answer = httpx.post(f"{running.url}gradio_api/upload", files={"files": ("a.png", b"pixels")}, timeout=60)
    path = Path(answer.json()[0])
    assert path.read_bytes() == b"pixels"
    return path


def ended(running: Server, by: signal.Signals) -> None:
    os.kill(running.pid, by)
    _, status = os.waitpid(running.pid, 0)
    assert (os.WIFSIGNALED(status), os.WTERMSIG(status)) == (True, by)


def test_files_are_the_owners_and_none_outlives_its_server(tmp_path: Path) -> None:
    environment = (("TMPDIR", str(tmp_path)), ("GRADIO_TEMP_DIR", ""))
    killed = server(environment=environment)
    (servers,) = tmp_path.glob(f"z-image-studio-{os.getuid()}")
    (servers / "mine.txt").write_text("x")
    assert servers.stat().st_mode & 0o777 == 0o700
    upload = uploaded(killed)
    own_files._remove_left(servers)
    assert upload.exists()  # of a server that runs
    ages = {"young": 0, "old": 11 * own_files.LOOK}
    for name, age in ages.items():  # without a lock: it may be made yet, or it never will
        (servers / name).mkdir()
        os.utime(servers / name, (time.time() - age,) * 2)
    own_files._remove_left(servers)
    assert [name for name in ages if (servers / name).exists()] == ["young"]
    (servers / "young").rmdir()
    ended(killed, signal.SIGKILL)
    assert upload.exists()

    next_one = server("--offline", environment=environment)
    assert not (servers / upload.relative_to(servers).parts[0]).exists()
    uploaded(next_one)
    ended(next_one, signal.SIGTERM)
    assert {path.name for path in servers.rglob("*")} <= {"mine.txt", own_files.LOCK}


def test_a_folder_of_somebody_else_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes it first, or puts a link in its place, would read what visitors bring."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"z-image-studio-{os.getuid()}").symlink_to(tmp_path / "theirs")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(PermissionError, match="somebody else's"):
        own_files._of_this_user()


def test_a_server_that_does_not_start_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "file"))
    with pytest.raises(RequestError, match=r"^GRADIO_TEMP_DIR: .*/file' is not possible"):
        web.server.serve(port=0)
    assert not Path(tempfile.gettempdir()).is_relative_to(tmp_path)  # it is looked up again
    assert [path.name for path in tmp_path.glob("z-image-studio-*/*")] == [own_files.LOCK]


def test_a_server_that_lost_its_lock_keeps_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own_files.settle()
    folder = Path(tempfile.gettempdir())
    (folder / own_files.LOCK).unlink()
    own_files._remove_left(folder.parent)  # as the next server to start does
    assert folder.exists()
    own_files.keep()
    own_files._remove_left(folder.parent)
    assert folder.exists()  # its lock is there again, and held
    os.utime(folder / own_files.LOCK, (0, 0))
    own_files.keep()
    assert (folder / own_files.LOCK).stat().st_mtime > 0
    shutil.rmtree(folder)
    own_files.keep()
    with tempfile.TemporaryDirectory() as made:
        assert Path(made).parent == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    own_files.leave()
    assert not folder.exists()


def test_what_a_cleaner_takes_is_made_again(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server runs for weeks, and a folder for temporary files that nobody came to for days is removed."""
    uploads = tmp_path / "uploads"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    with api_server(engine) as address:
        for content in (b"one", b"two"):
            kept = httpx.post(f"{address}/files", files={"file": ("a.bin", content)}).json()
            assert httpx.get(kept["url"]).content == content
            shutil.rmtree(uploads)
            assert httpx.get(kept["url"]).status_code == 404
    monkeypatch.setenv("GRADIO_TEMP_DIR", "/proc/nowhere")
    with pytest.raises(NotWritten, match="/proc/nowhere"):
        own_files.for_a_request()
