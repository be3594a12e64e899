"""The command `models` in a process of its own, with the real registry, against a hub on loopback; and no network."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client
from PIL import Image

from hub.parts import PARTS
from tests.helpers import comfyui, sparse
from tests.helpers.hub_server import Fault, Hub

ROOT = Path(__file__).parent.parent.parent
REPO, FILE = "lllyasviel/Annotators", "RealESRGAN_x4plus.pth"
SIZE = 67_040_989
PATIENCE = 240  # seconds, far more than any command here takes; a machine may be busy

# Ends the process at the first look at a network: any address but a local socket's, with LOCAL any machine but this.
WATCHED = """
import os, runpy, sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        asked = arguments[0] if event.startswith("socket.get") else arguments[-1]
        host = asked[0] if isinstance(asked, tuple) else asked
        if "LOCAL" in os.environ and host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", None):
            return
        if event.startswith("socket.get") or isinstance(asked, tuple):
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
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == code, done.stderr
    return done


def wait_for(condition: Callable[[], object], what: str, process: subprocess.Popen[Any], log: Path) -> None:
    """Wait for what a process is to do; fail where it ends before."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"waited in vain for {what}:\n{log.read_text()}"
        time.sleep(0.05)


@pytest.mark.slow
def test_from_nothing_to_whole_to_damaged_to_fixed(hub: Hub, environ: dict[str, str], tmp_path: Path) -> None:
    assert "upscaler" in models(environ, "list").stderr.split("models download ")[1]

    done = models(environ, "download", "upscaler")
    assert done.stdout == "upscaler: fetched and checked\n"
    assert "Fetching 1 files, 67 MB (67 MB still to come)" in done.stderr
    link = tmp_path / "models" / REPO / FILE
    assert link.stat().st_size == SIZE
    assert link.is_symlink()

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


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX's")
def test_a_terminal_gets_a_bar_and_each_edition_is_weighed(hub: Hub, environ: dict[str, str]) -> None:
    """Nothing of the repackaged Turbo is at this hub, which is asked for the right repository."""
    import termios

    hub.repos = {REPO: {FILE: bytes(SIZE)}, "Comfy-Org/z_image_turbo": {}}
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    command = [sys.executable, "cli.py", "models", "download"]
    with os.fdopen(ours, "rb", buffering=0) as screen:
        with os.fdopen(theirs, "wb") as stderr:
            code = subprocess.call([*command, "upscaler"], cwd=ROOT, env=environ, stderr=stderr, timeout=PATIENCE)
        shown = screen.read(100_000).decode()
        with contextlib.suppress(OSError):  # a terminal that nobody writes to any more ends with an error
            while more := screen.read(100_000):
                shown += more.decode()
    assert code == 0
    assert re.search(r"\r0 of 1 files:.*%\|.*67\.0M/67\.0M \[.*B/s\]", shown), shown

    done = models(environ, "download", "--edition", "repackaged", code=1)
    assert "What is missing weighs 32.8 GB official, 20.7 GB repackaged (--edition); fetching repackaged" in done.stderr
    assert "Comfy-Org/z_image_turbo at http" in done.stderr
    assert "20.7 GB with --edition repackaged): " in models(environ, "list", "turbo", *NEEDED.split()).stderr


@pytest.mark.slow
def test_a_hub_that_stops_answering_is_given_up_with_a_sentence(hub: Hub, environ: dict[str, str]) -> None:
    hub.faults[FILE] = Fault("slow")
    done = models(environ | {"HF_HUB_DOWNLOAD_TIMEOUT": "1"}, "download", "upscaler", "--json", code=1)
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "download_failed"
    assert "stopped answering (ReadTimeout)" in error["message"]
    assert "the next try goes on from there" in error["message"]


@pytest.mark.slow
def test_an_interrupt_on_a_dead_line_ends_with_130(hub: Hub, environ: dict[str, str], tmp_path: Path) -> None:
    hub.faults[FILE] = Fault("slow")
    command = [sys.executable, "cli.py", "models", "download", "upscaler"]
    log = tmp_path / "log.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=out)
    try:
        wait_for(lambda: hub.asked("GET", "/storage"), "the download to begin", process, log)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE) == 130
    finally:
        process.kill()
        process.wait(timeout=PATIENCE)
    assert log.read_text().endswith("the request was cancelled\n")


@pytest.mark.slow
def test_the_list_says_what_each_file_is(environ: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "AI" / "models" / "diffusion_models"
    write_sparse = sparse.write_sparse
    write_sparse(folder / "z_image_turbo_fp8_e4m3fn.safetensors", comfyui.TRANSFORMER, "F8_E4M3")
    write_sparse(folder / "anime_zit.safetensors", comfyui.TRANSFORMER, "F16")
    write_sparse(folder / "z_image_mix.safetensors", comfyui.TRANSFORMER)
    write_sparse(folder / "zit_int8.safetensors", comfyui.TRANSFORMER, "I8")
    told = models(environ, "list", "--models", str(tmp_path / "AI")).stdout.splitlines()
    assert told[0].endswith("in the ComfyUI folder (z_image_turbo_fp8_e4m3fn.safetensors, fp8)")
    assert told[-3:-1] == [
        f"checkpoint anime_zit.safetensors: fp16, 12.3 GB, made of Z-Image Turbo, in {folder}",
        f"checkpoint z_image_mix.safetensors: bf16, 12.3 GB, it does not say of which model (--model), in {folder}",
    ]
    assert told[-1].startswith(f"not usable: {folder}/zit_int8.safetensors is packed as int8")
    facts = json.loads(models(environ, "list", "--json", "--models", str(folder)).stdout)
    assert [(tune["name"], tune["model"]) for tune in facts["checkpoints"]] == [
        ("anime_zit.safetensors", "turbo"),
        ("z_image_mix.safetensors", None),
    ]
    assert "anime" not in models(environ, "list", "turbo", "--models", str(folder)).stdout


def test_an_unknown_part_is_refused_with_the_known_ones(environ: dict[str, str]) -> None:
    done = models(environ, "download", "nix", code=2)
    assert done.stderr.startswith("part: 'nix' is not possible; allowed: turbo, base,")


def test_nothing_to_verify_names_what_is_missing(environ: dict[str, str]) -> None:
    done = models(environ, "verify", code=3)
    assert done.stderr.rstrip().endswith("models download turbo text_encoder vae tokenizer")


# --- no network


def watched(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WATCHED, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=PATIENCE)


def test_the_watch_sees_a_download(environ: dict[str, str]) -> None:
    assert watched(environ, "models", "download", "upscaler").returncode == 97


NEEDED = "turbo text_encoder vae tokenizer"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "variables", "lacks"),
    [
        ("models list --offline", {}, None),
        ("models download upscaler --offline", {}, "upscaler"),
        ("models download upscaler --hub modelscope --offline", {}, "upscaler"),
        ("models download upscaler", {"HF_HUB_OFFLINE": "1"}, "upscaler"),
        ("models verify --offline", {}, NEEDED),
        ("doctor --offline", {}, None),
        ("generate apple --steps 1 --offline --device cpu --out {}/x.png", {}, None),
        ("generate apple --steps 1 --device cpu --out {}/x.png", {"HF_HUB_OFFLINE": "1"}, None),
        ("generate apple --offline --weights full", {}, NEEDED),
        ("generate apple --offline --weights full --model base", {}, "base text_encoder vae tokenizer"),
        ("controlnet apple --image {}/in.png --offline --weights full", {}, f"{NEEDED} controlnet"),
        ("controlnet apple --image {}/in.png --offline --preprocessor depth", {}, "depth"),
        ("preprocess --image {}/in.png --preprocessor depth --out {}/y.png --offline", {}, "depth"),
        ("upscale --image {}/in.png --offline --weights full", {}, NEEDED),
        ("upscale --image {}/in.png --offline --device cpu --upscaler fast --out {}/x.png", {}, None),
    ],
)
def test_offline_never_touches_the_network_and_what_is_missing_has_its_command(
    arguments: str, variables: dict[str, str], lacks: str | None, hub: Hub, environ: dict[str, str], tmp_path: Path
) -> None:
    Image.new("RGB", (20, 20), "white").save(tmp_path / "in.png")
    done = watched(environ | variables, *arguments.format(*[tmp_path] * 2).split())
    assert (done.returncode, "NETWORK" in done.stderr) == (3 if lacks else 0, False), done.stderr
    assert hub.requests == []
    command = "run.bat models download" if os.name == "nt" else "bash run.sh models download"
    if arguments.startswith("generate"):  # the miniature's pictures name it as well
        assert f"{command} {lacks or NEEDED}" in done.stderr
    if lacks:
        assert f"{command} {lacks}\n" in done.stderr
        assert "B" in done.stderr  # and how much that is


@pytest.mark.slow
def test_the_page_touches_no_network_but_its_own(environ: dict[str, str], tmp_path: Path) -> None:
    """Started offline, and a picture drawn: whatever goes further than this machine ends the server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", WATCHED, "serve", "--offline", "--device", "cpu", "--port", port]
    log = tmp_path / "log.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environ | {"LOCAL": "1"}, stdout=out, stderr=out)
    try:
        wait_for(lambda: "Ctrl+C" in log.read_text(), "the page to be served", process, log)
        client = Client(f"http://127.0.0.1:{port}", verbose=False)
        assert client.predict("an apple", steps=1, seed=3, api_name="/generate")[1]["request"]["seed"] == 3
        assert process.poll() is None, log.read_text()
        assert "NETWORK" not in log.read_text()
    finally:
        process.terminate()
        process.wait(timeout=30)


# --- everything there


@pytest.mark.slow
def test_with_everything_there_nothing_is_fetched(environ: dict[str, str], tmp_path: Path) -> None:
    """Full-size files without data: what only looks at them cannot tell."""
    cache = tmp_path / "hf" / "hub"
    repos: dict[str, list[str]] = {}
    for part in PARTS.values():
        repos.setdefault(part.repo, []).append(part.name)
    for repo, parts in repos.items():
        sparse.write_hub_snapshot(cache, repo, parts)
    done = watched(environ, "models", "download", "all")
    assert (done.returncode, "NETWORK" in done.stderr) == (0, False), done.stderr
    assert done.stdout.endswith(": here already\n")
    listed = json.loads(watched(environ, "models", "list", "--json").stdout)["models"]
    assert all(part["present"] and not part["problems"] for part in listed)
    # Chosen by themselves, and planned for before anything is read: 1 GB is too little for any plan.
    done = watched(environ, "generate", "apple", "--device", "cpu", "--memory", "1")
    assert (done.returncode, "NETWORK" in done.stderr) == (4, False), done.stderr
    facts = json.loads(watched(environ, "doctor", "--json", "--device", "cpu", "--memory", "40").stdout)
    assert facts["weights"].startswith("full")
    assert facts["memory plan"]["generate"][0].startswith("40 GB allowed: ")
