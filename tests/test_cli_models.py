"""The command `models` in a process of its own, with the real registry, against a hub on loopback; and no network."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Fault, Hub

ROOT = Path(__file__).parent.parent
REPO, FILE = "lllyasviel/Annotators", "RealESRGAN_x4plus.pth"
SIZE = 67_040_989

# Ends the process at the first look at a network: any address but a local socket's.
WATCHED = """
import os, runpy, sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        if event.startswith("socket.get") or isinstance(arguments[1], tuple):
            os.write(2, f"NETWORK: {event} {arguments[1:]}".encode())
            os._exit(97)

sys.addaudithook(watch)
sys.argv = ["cli.py", *sys.argv[1:]]
runpy.run_path("cli.py", run_name="__main__")
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    running = Hub({REPO: {FILE: bytes(SIZE), "README.md": b"x"}}).start()
    yield running
    running.stop()


@pytest.fixture
def environ(hub: Hub, tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MODELSCOPE_"))}
    return kept | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "MODELSCOPE_CACHE": str(tmp_path / "ms"),
        "DIFFSYNTH_MODEL_BASE_PATH": str(tmp_path / "models"),
    }


def models(environ: dict[str, str], *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "cli.py", "models", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def test_from_nothing_to_whole_to_damaged_to_mended(hub, environ, tmp_path) -> None:
    assert "upscaler" in models(environ, "list").stderr.split("models download ")[1]

    done = models(environ, "download", "upscaler")
    assert done.stdout == "upscaler: fetched and checked\n"
    assert "Fetching 1 files, 67 MB (67 MB still to come)" in done.stderr
    link = tmp_path / "models" / REPO / FILE
    assert link.stat().st_size == SIZE and link.is_symlink()

    seen = len(hub.requests)
    assert models(environ, "download", "upscaler").stdout == "upscaler: here already\n"
    assert len(hub.requests) == seen

    done = models(environ, "verify", "--json")
    (facts,) = json.loads(done.stdout)["models"]
    assert (facts["part"], facts["state"], facts["digest_unknown"]) == ("upscaler", "whole", [])

    with open(link, "r+b") as file:
        file.write(b"\1")
    done = models(environ, "verify", code=3)
    assert "upscaler: broken\n" in done.stdout
    assert done.stderr.rstrip().endswith("models download upscaler --repair")
    assert json.loads(models(environ, "verify", "upscaler", "--json", code=3).stdout)["error"]["command"] in done.stderr

    facts = json.loads(models(environ, "download", "upscaler", "--repair", "--json").stdout)
    assert (len(facts["fetched"]), facts["bytes"]) == (1, SIZE)
    assert models(environ, "verify").stdout.startswith("upscaler: whole (")


def test_a_hub_that_stops_answering_is_given_up_with_a_sentence(hub, environ) -> None:
    hub.faults[FILE] = Fault("slow")
    done = models(environ | {"HF_HUB_DOWNLOAD_TIMEOUT": "1"}, "download", "upscaler", "--json", code=1)
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "download_failed"
    assert "stopped answering (ReadTimeout)" in error["message"]
    assert "the same command goes on from there" in error["message"]


def test_an_interrupt_on_a_dead_line_ends_with_130(hub, environ) -> None:
    hub.faults[FILE] = Fault("slow")
    command = [sys.executable, "cli.py", "models", "download", "upscaler"]
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True)
    while not hub.asked("GET", "/storage"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert said.endswith("the request was cancelled\n")


def test_an_unknown_part_is_refused_with_the_known_ones(environ) -> None:
    done = models(environ, "download", "nix", code=2)
    assert done.stderr.startswith("part: 'nix' is not possible; allowed: turbo, base,")


def test_nothing_to_verify_names_what_is_missing(environ) -> None:
    done = models(environ, "verify", code=3)
    assert done.stderr.rstrip().endswith("models download turbo text_encoder vae tokenizer")


# --- no network


def watched(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WATCHED, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)


def test_the_watch_sees_a_download(environ) -> None:
    assert watched(environ, "models", "download", "upscaler").returncode == 97


@pytest.mark.parametrize(
    ("arguments", "variables", "code"),
    [
        (["models", "list", "--offline"], {}, 0),
        (["models", "download", "upscaler", "--offline"], {}, 3),
        (["models", "download", "upscaler", "--hub", "modelscope", "--offline"], {}, 3),
        (["models", "download", "upscaler"], {"HF_HUB_OFFLINE": "1"}, 3),
        (["doctor", "--offline"], {}, 0),
        (["generate", "a red apple", "--steps", "1", "--offline", "--device", "cpu", "--out", "{}/x.png"], {}, 0),
        (["generate", "a red apple", "--offline", "--weights", "full"], {}, 3),
    ],
)
def test_offline_never_touches_the_network(arguments, variables, code, hub, environ, tmp_path) -> None:
    done = watched(environ | variables, *(argument.format(tmp_path) for argument in arguments))
    assert (done.returncode, "NETWORK" in done.stderr) == (code, False), done.stderr
    assert hub.requests == []
    if code == 3:
        assert "bash run.sh models download " in done.stderr or "run.bat models download " in done.stderr
