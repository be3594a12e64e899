"""How long a visitor waits for a new process: for the page, and for the first picture.

    .venv/bin/python bench/speed.py [--runs 5]

Why: these are the waits that somebody on a laptop feels; `bench/pipelines.py` has those of a process that is warm.
Prints a table, and all figures as JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PROMPT = "a red apple on a blue background"


def seconds(work: Callable[[], object]) -> float:
    """Return the wall seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def start_to_page() -> float:
    """Return the seconds from starting the command to the page's first answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, ROOT / "cli.py", "serve", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
                    answer.read()
                return time.perf_counter() - started
            except urllib.error.URLError:
                if server.poll() is not None:
                    raise RuntimeError("the server stopped before it answered") from None
                time.sleep(0.05)
    finally:
        server.terminate()
        server.wait()


def first_image(folder: Path) -> float:
    """Return the seconds of a command that draws one image, set-up excluded."""
    command: list[str | Path] = [sys.executable, ROOT / "cli.py", "generate", PROMPT, "--seed", "7"]
    command += ["--weights", "mini", "--out", folder / "first.png"]
    return seconds(lambda: subprocess.run(command, check=True, capture_output=True))


def main() -> None:
    """Measure everything and print it."""
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each; the median is reported")
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        taken = {
            "start to reachable page": [start_to_page() for _ in range(runs)],
            "first picture of a process": [first_image(Path(folder)) for _ in range(runs)],
        }
    medians = {name: statistics.median(times) for name, times in taken.items()}
    for name, times in taken.items():
        print(f"{name:42} {medians[name]:7.3f} s  (from {min(times):.3f} to {max(times):.3f})")
    print(json.dumps({"runs": runs, "median_seconds": medians}))


if __name__ == "__main__":
    main()
