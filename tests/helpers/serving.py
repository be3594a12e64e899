"""The real server in a process of its own, as a visitor meets it: `python cli.py serve` on the miniature."""

from __future__ import annotations

import atexit
import functools
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
START_SECONDS = 120  # far more than it takes; a machine may be busy


@dataclass(frozen=True)
class Server:
    """A running server: its address, the file that everything it prints goes to, and its process."""

    url: str
    log: Path
    pid: int

    def has_mapped(self, library: str) -> bool:
        """Whether the process has loaded a shared library of such a name (on Linux)."""
        return library in Path(f"/proc/{self.pid}/maps").read_text()


@functools.cache
def server(
    *flags: str, root: Path = ROOT, environment: tuple[tuple[str, str], ...] = (), program: str = "cli.py"
) -> Server:
    """Start the server of the program in `root`, once for all tests; it stops when the tests end.

    `environment` is what there is besides that of the tests; `program` may be a script that ends in the program.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="studio-server-"))
    command = [sys.executable, program, "serve", "--weights", "mini", "--device", "cpu", "--port", str(port), *flags]
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(
            command, cwd=root, env=os.environ | dict(environment), stdout=log, stderr=subprocess.STDOUT
        )
    atexit.register(_stop, process)
    running = Server(f"http://127.0.0.1:{port}/", folder / "log.txt", process.pid)
    _await(running, process)
    return running


def _await(running: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(running.url, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # it answers, if only that one must log in
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the server did not start:\n{running.log.read_text()}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
