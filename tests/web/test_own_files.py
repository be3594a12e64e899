"""The files that a real server keeps, and what is left of them when it is stopped."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.helpers.serving import server
from web import own_files


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and permissions")
def test_files_are_the_owners_and_go_when_the_server_is_terminated(tmp_path: Path) -> None:
    running = server(environment=(("TMPDIR", str(tmp_path)),))
    folder = tmp_path / "gradio"
    assert folder.stat().st_mode & 0o777 == 0o700
    answer = httpx.post(f"{running.url}gradio_api/upload", files={"files": ("a.png", b"pixels")}, timeout=60)
    assert [Path(path).read_bytes() for path in answer.json()] == [b"pixels"]
    os.kill(running.pid, signal.SIGTERM)
    _, status = os.waitpid(running.pid, 0)
    assert (os.WIFSIGNALED(status), os.WTERMSIG(status)) == (True, signal.SIGTERM)
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_what_a_killed_server_left_goes_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_files, "get_upload_folder", lambda: str(tmp_path))
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    left = [tmp_path / ("a" * 64) / "picture.png", tmp_path / "tmpabcd_123"]
    others = [tmp_path / "mine" / "picture.png", tmp_path / "tmp.txt"]
    for path in (*left, *others):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    own_files.settle()
    assert all(path.exists() for path in (*left, *others))  # another server may need them
    now = time.time() + own_files.LEFT_OVER + 1
    monkeypatch.setattr(time, "time", lambda: now)
    own_files.settle()
    assert [path.exists() for path in (*left, *others)] == [False, False, True, True]
    left[1].write_text("x")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    own_files.settle()
    assert left[1].exists()  # a folder that somebody chose may hold other things too
