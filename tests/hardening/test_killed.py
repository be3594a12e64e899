"""The command line, killed at any moment: nothing half lies under a final name, and the same command does the rest."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.command_line import Command
from tests.helpers.effort import effort
from tests.helpers.hub_server import Hub

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 240  # seconds, far more than any command here takes; a machine may be busy
DRAW = ("generate", "a red fox", "--seed", 5, "--steps", 2, "--count", 3, "--weights", "mini", "--out-dir", "drawn")
REPO, FILE, SIZE = "lllyasviel/Annotators", "RealESRGAN_x4plus.pth", 67_040_989

# Ends its own process as SIGKILL does, at what it does with files in FOLDER: before it opens one to write for the n-th
# time, or before the n-th gets its final name; or when one of them grows beyond n bytes, by the system itself.
ENDED = """
import os, resource, runpy, signal, sys

folder, kind, number, *sys.argv = sys.argv[1:]
seen = 0

def watch(event, arguments):
    global seen
    if event not in ("open", "os.rename") or not isinstance(arguments[0], (str, bytes, os.PathLike)):
        return
    if not os.path.abspath(os.fsdecode(arguments[0])).startswith(folder):
        return
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        return
    if kind == "bytes":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(number), int(number)))
    elif event == kind:
        seen += 1
        if seen == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if kind != "line":
    sys.addaudithook(watch)
runpy.run_path("cli.py", run_name="__main__")
"""

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits"),
    pytest.mark.timeout(effort(300, 7200)),
]


def killed(folder: Path, kind: str, number: int, *arguments: object, environ: dict[str, str] | None = None) -> bool:
    """Run a command and kill it at a moment; return whether that came, or the command was done before.

    Args:
        folder: where it writes.
        kind: "line" (after so many lines on stderr), or as ENDED has it: "open", "os.rename", "bytes".
        number: which of them.
        arguments: the command's own.
        environ: its environment; that of the tests where none is given.
    """
    command = [sys.executable, "-c", ENDED, folder, kind, number, "cli.py", *arguments]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    told = []
    with process:
        for line in process.stderr:
            told.append(line)
            if kind == "line" and len(told) == number:
                process.kill()
        code = process.wait(PATIENCE)
    assert code in (0, -signal.SIGKILL, -signal.SIGXFSZ), "".join(told)
    return code != 0


def check_nothing_half(folder: Path) -> list[str]:
    """Check that each file with a final name is whole; return their names."""
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            image.load()
        if path.name.startswith("z-image"):
            assert path.with_suffix(".json").exists(), f"{path.name} has no JSON, and is taken for done"
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".part")


def moments() -> list[tuple[str, int]]:
    """Return at which moments the drawing of three pictures is killed, one after the other in one folder."""
    # While a picture is half written; with one of its two files placed; and after that, while the second is drawn.
    chosen = [("bytes", 9000), ("os.rename", 2), ("line", 14)]
    drawn = random.Random(22)
    numbers = {"line": 24, "bytes": 20_000, "open": 6, "os.rename": 6}
    kinds = [drawn.choice(list(numbers)) for _ in range(effort(0, 197))]
    return chosen + [(kind, drawn.randint(1, numbers[kind])) for kind in kinds]


def test_drawing_killed_at_any_moment_goes_on(command_here: Command, tmp_path: Path) -> None:
    folder = tmp_path / "drawn"
    wanted = sorted(f"z-image-{seed}.{kind}" for seed in (5, 6, 7) for kind in ("json", "png"))
    died = 0
    for kind, number in moments():
        died += killed(folder, kind, number, *DRAW[:-1], folder)
        if folder.exists() and check_nothing_half(folder) == wanted:  # from the beginning
            for path in folder.iterdir():
                path.unlink()
    assert died >= effort(3, 100)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    done = command_here(*DRAW, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("skipped: ") == len(before)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert check_nothing_half(folder) == wanted


def test_a_control_image_is_whole_or_not_there(command_here: Command, tmp_path: Path) -> None:
    Image.effect_noise((256, 256), 80).convert("RGB").save(tmp_path / "in.jpg")
    folder = tmp_path / "out"
    folder.mkdir()
    command = ("preprocess", "--image", tmp_path / "in.jpg", "--preprocessor", "gray", "--out", folder / "control.png")
    assert killed(folder, "bytes", 5000, *command)
    assert check_nothing_half(folder) == []
    assert command_here(*command, cwd=tmp_path).returncode == 0
    assert check_nothing_half(folder) == ["control.png"]


def test_a_killed_download_goes_on(tmp_path: Path) -> None:
    hub = Hub({REPO: {FILE: bytes(SIZE), "README.md": b"x"}}).start()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MODELSCOPE_"))}
    environ = kept | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "DIFFSYNTH_MODEL_BASE_PATH": str(tmp_path / "models"),
    }
    try:
        for kind, number in (("bytes", SIZE // 2), ("os.rename", 1), ("line", 99)):
            died = killed(tmp_path, kind, number, "models", "download", "upscaler", environ=environ)
            named = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 1000]
            whole = {path.stat().st_size == SIZE for path in named if not path.name.endswith(".incomplete")}
            assert whole == (set() if died else {True})
            assert died == (kind != "line")
        assert hub.sent < SIZE * 1.5  # half of it had arrived, and was not sent again
    finally:
        hub.stop()
