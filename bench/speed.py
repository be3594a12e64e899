"""How long a visitor waits for a new process: for the page, and for the first picture.

    .venv/bin/python bench/speed.py [--runs 5]
    .venv/bin/python bench/speed.py --against FOLDER [--runs 5]

The second compares the first picture of a process with another checkout's, in turn, and measures nothing else.

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


def first_image(folder: Path, root: Path = ROOT) -> float:
    """Return the seconds of a command that draws one image with the checkout at `root`, set-up excluded."""
    command: list[str | Path] = [sys.executable, root / "cli.py", "generate", PROMPT, "--seed", "7"]
    command += ["--weights", "mini", "--out", folder / "first.png"]
    return seconds(lambda: subprocess.run(command, check=True, capture_output=True, cwd=root))


def compare_first_images(folder: Path, other: Path, runs: int) -> None:
    """Measure the first picture of a process, here and with another checkout, in turn; print both and their ratio."""
    taken: dict[str, list[float]] = {"here": [], "there": []}
    for run in range(runs + 1):
        for name, root in (("there", other), ("here", ROOT)):
            once = first_image(folder, root)
            if run:  # the first of each compiles its modules and fills the disk's cache
                taken[name].append(once)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    for name, times in taken.items():
        print(f"first picture {name:6} {medians[name]:7.3f} s  (from {min(times):.3f} to {max(times):.3f})")
    ratio = medians["here"] / medians["there"]
    print(f"here takes {ratio:.2f} times as long as there")
    print(json.dumps({"runs": runs, "median_seconds": medians, "ratio": ratio}))


def main() -> None:
    """Measure everything and print it."""
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each; the median is reported")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout, for the first picture alone")
    args = parser.parse_args()
    runs: int = args.runs
    with tempfile.TemporaryDirectory() as folder:
        if args.against is not None:
            compare_first_images(Path(folder), args.against.resolve(), runs)
            return
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
