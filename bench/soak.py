"""Whether a server stays as it is: mixed requests from several clients for a while, each answer compared by its bytes.

    .venv/bin/python bench/soak.py [--clients 8] [--seconds 120] [--requests 2000]

A real server on the miniature, on this machine. One of each kind is sent first; after that an answer with another
digest than the first of its kind is wrong, and none within ANSWER_SECONDS is lost. A refusal (429) is counted, and
asked again after its Retry-After. Ends with 1 where anything was wrong or lost.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
ANSWER_SECONDS = 600  # an answer that takes longer is lost
LOOK = 0.5  # seconds between two looks at a job, and at the memory
IDLE = 15  # seconds without requests before the memory is looked at for the last time
PROMPT = "a red fox on a blue background"

Ask = Callable[[httpx.Client], bytes]


class Refused(Exception):
    """429, with the seconds to wait."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


def taken(answer: httpx.Response, status: int = 200) -> httpx.Response:
    """Return an answer of a status; refuse any other."""
    if answer.status_code == 429:
        raise Refused(float(answer.headers["retry-after"]))
    if answer.status_code != status:
        raise ValueError(f"{answer.status_code} in place of {status}: {answer.text[:200]}")
    return answer


def photo() -> bytes:
    """Return a PNG of 64 x 48 pixels."""
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((64, 48)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


PHOTO = photo()


def endpoint(client: httpx.Client) -> bytes:
    """Draw by the named endpoint, as gradio_client does."""
    fields = {"prompt": PROMPT, "seed": 3, "steps": 4}
    event = taken(client.post("gradio_api/call/v2/generate", json=fields)).json()["event_id"]
    text = client.get(f"gradio_api/call/v2/generate/{event}").text
    found = re.search(r"^event: complete\r?\ndata: (.*)$", text, re.MULTILINE)
    if found is None:
        raise ValueError(text[-200:])
    return taken(client.get(json.loads(found[1])[0]["url"])).content


def openai_text(client: httpx.Client) -> bytes:
    """Draw by OpenAI's route."""
    answer = taken(client.post("v1/images/generations", json={"prompt": PROMPT, "seed": 4, "size": "128x128"}))
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def openai_controlnet(client: httpx.Client) -> bytes:
    """Draw after a picture's shape, by OpenAI's route for edits."""
    fields = {"prompt": PROMPT, "seed": "5"}
    answer = taken(client.post("v1/images/edits", data=fields, files={"image": ("a.png", PHOTO)}))
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def upscale_job(client: httpx.Client) -> bytes:
    """Enlarge by a job that is asked about until it is done."""
    fields = {"mode": "upscale", "upscaler": "fast", "denoise": "0", "seed": "6"}
    job = taken(client.post("v1/jobs", data=fields, files={"image": ("a.png", PHOTO)}), 202).json()
    while job["state"] in ("queued", "running"):
        time.sleep(LOOK)
        job = taken(client.get(f"v1/jobs/{job['id']}")).json()
    return taken(client.get(job["files"][0]["url"])).content


def malformed(client: httpx.Client) -> bytes:
    """Send what makes no sense."""
    told = [
        taken(client.post("v1/images/generations", json={"prompt": PROMPT, "size": "0x0"}), 400),
        taken(client.post("v1/jobs", json={"mode": "nothing"}), 400),
        taken(client.post("v1/images/edits", data={"prompt": PROMPT}, files={"image": ("a.png", PHOTO[:99])}), 400),
    ]
    return b"".join(answer.content for answer in told)


def cancelled(client: httpx.Client) -> bytes:
    """Begin what takes long, and cancel it."""
    fields = {"mode": "generate", "prompt": PROMPT, "model": "base", "steps": 100}
    job = taken(client.post("v1/jobs", json=fields), 202).json()
    taken(client.delete(f"v1/jobs/{job['id']}"))
    while job["state"] in ("queued", "running"):
        time.sleep(LOOK)
        job = taken(client.get(f"v1/jobs/{job['id']}")).json()
    return str(job["state"]).encode()


KINDS: dict[str, Ask] = {
    ask.__name__: ask for ask in (endpoint, openai_text, openai_controlnet, upscale_job, malformed, cancelled)
}


@dataclass
class Seen:
    """What came of the requests of all clients."""

    first: dict[str, str] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, kind: str, client: httpx.Client) -> None:
        """Send a request until it is not refused, and judge what comes."""
        start = time.monotonic()
        while True:
            try:
                digest = hashlib.sha256(KINDS[kind](client)).hexdigest()
            except Refused as refused:
                with self.lock:
                    self.refused += 1
                time.sleep(refused.seconds)
                continue
            except Exception as error:  # whatever it is, there is no answer
                with self.lock:
                    self.lost.append(f"{kind}: {type(error).__name__}: {error}")
                return
            break
        with self.lock:
            self.done[kind] += 1
            self.waits.append(time.monotonic() - start)
            if self.first.setdefault(kind, digest) != digest:
                self.wrong.append(kind)


def serve(log: Any) -> tuple[subprocess.Popen[bytes], str]:
    """Start a server; return its process and address."""
    command = [sys.executable, "cli.py", "serve", "--weights", "mini", "--device", "cpu", "--port", "0"]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=log)
    assert process.stdout is not None
    found = re.search(rb"http://\S+", process.stdout.readline())
    if found is None:
        raise SystemExit("the server did not start")
    return process, found[0].decode()


def slope(points: list[tuple[int, float]]) -> float:
    """Return by how much the second of each pair grows with the first, by least squares over the later half."""
    later = points[len(points) // 2 :]
    if len({count for count, _ in later}) < 2:
        return 0.0
    return statistics.linear_regression(*zip(*later, strict=True)).slope


def soak(clients: int, seconds: float, requests: int) -> int:
    """Send requests until the time or their number is reached; print what came of them."""
    seen, turn = Seen(), iter(range(requests))
    with tempfile.TemporaryFile() as log:
        process, url = serve(log)
        try:
            memory = psutil.Process(process.pid)
            with httpx.Client(base_url=url, timeout=ANSWER_SECONDS) as client:
                for kind in KINDS:
                    seen.ask(kind, client)
            if seen.lost:
                raise SystemExit("\n".join(seen.lost))
            before, end, points = memory.memory_info().rss, time.monotonic() + seconds, []
            seen.waits.clear()

            def work() -> None:
                with httpx.Client(base_url=url, timeout=ANSWER_SECONDS) as client:
                    while time.monotonic() < end:
                        with seen.lock:
                            number = next(turn, None)
                        if number is None:
                            return
                        seen.ask(list(KINDS)[number % len(KINDS)], client)

            threads = [threading.Thread(target=work) for _ in range(clients)]
            start = time.monotonic()
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                points.append((seen.done.total(), memory.memory_info().rss / 1e6))
                time.sleep(LOOK)
            took = time.monotonic() - start
            time.sleep(IDLE)
            after = memory.memory_info().rss
        finally:
            process.terminate()
            process.wait()
        log.seek(0)
        tracebacks = log.read().count(b"Traceback")
    print(f"{clients} clients, {took:.0f} s: {len(seen.waits)} answers, of all kinds {dict(seen.done)}")
    print(f"wrong {len(seen.wrong)}, lost {len(seen.lost)}, refused {seen.refused}, tracebacks {tracebacks}")
    print(f"wait: median {statistics.median(seen.waits):.1f} s, largest {max(seen.waits):.1f} s")
    print(
        f"resident memory: {before / 1e6:.0f} MB before, {max(size for _, size in points):.0f} at most, "
        f"{after / 1e6:.0f} after {IDLE} s of rest; {1000 * slope(points):.0f} MB per 1000 requests in the later half"
    )
    for line in sorted(set(seen.wrong + seen.lost)):
        print(line)
    return 1 if seen.wrong or seen.lost else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument(
        "--requests", type=int, default=1_000_000, help="at most so many (default: until the time is up)"
    )
    args = parser.parse_args()
    sys.exit(soak(args.clients, args.seconds, args.requests))
