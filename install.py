"""Set-up behind run.sh, run.bat and test.sh: makes .venv from the lock files, then starts a script in it.

    python install.py [--extra test] [SCRIPT [ARGUMENT ...]]

Standard library only, and readable by Python 3.8, so that an interpreter that is too old still gets a sentence.
Everything shown here goes to stderr: stdout belongs to the script.

Z_IMAGE_TORCH chooses the build of torch: auto (the default), cpu, cuda, pip, or a name such as cu126.

A stamp, written last, records which locks .venv was made from. While it holds, nothing but the script is started;
a .venv without one was cut short, and is made again rather than trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Callable, Iterator, Mapping, NamedTuple, NoReturn, Sequence

WINDOWS = sys.platform == "win32"
MINORS = (11, 12, 13)  # of Python 3
SUPPORTED = "Python 3.11, 3.12 or 3.13"
LOCKS = {"": "requirements.lock", "test": "requirements-test.lock"}
TORCH_LOCK = "requirements-torch.lock"  # apart and without hashes: its builds differ by machine
# Where PyTorch publishes its builds, a folder each: https://pytorch.org/get-started/locally/
TORCH_INDEX = "https://download.pytorch.org/whl"
CUDA_BUILD = "cu130"  # the build that the locked torch has on PyPI for Linux: its metadata asks for CUDA 13.0
TORCH = "torch"  # the stamp's line for the build of torch, beside those of the locks
PROBE = """
import sys
try:
    import ensurepip, venv
    whole = True
except ImportError:
    whole = False
print("%d.%d.%d" % sys.version_info[:3], whole, getattr(sys, "_base_executable", sys.executable), sep="\\n")
"""


class SetupError(Exception):
    """The set-up cannot go on; the text gives the reason and what to do."""


class Interpreter(NamedTuple):
    """A Python that answered: its version, whether it can make environments, and where it is."""

    version: str
    whole: bool
    path: str

    @property
    def supported(self) -> bool:
        """Whether the app runs on this version."""
        major, minor = self.version.split(".")[:2]
        return major == "3" and int(minor) in MINORS


def show(text: str) -> None:
    """Print a line for the user, on stderr."""
    print(text, file=sys.stderr, flush=True)


# Finding a Python


def candidates(platform: str = sys.platform) -> list[list[str]]:
    """The commands that may start a supported Python, most wanted first."""
    names = [f"python3.{minor}" for minor in MINORS] + ["python3", "python"]
    launcher = [["py", f"-3.{minor}"] for minor in MINORS] if platform == "win32" else []
    return [[sys.executable], *launcher, *([name] for name in names)]


def probe(command: Sequence[str]) -> Interpreter | None:
    """Start `command` and ask what it is; None where it does not run. A name on PATH may be a stub or a shim."""
    try:
        answer = subprocess.run(
            [*command, "-I", "-c", PROBE],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=60,
            check=True,
            text=True,
        ).stdout.splitlines()
        return Interpreter(answer[0], answer[1] == "True", answer[2])
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def find_python(
    commands: Sequence[Sequence[str]], ask: Callable[[Sequence[str]], Interpreter | None] = probe
) -> Interpreter:
    """The first of `commands` that is a supported, whole Python. Raises SetupError with what was found instead."""
    found: dict[str, str] = {}
    for command in commands:
        python = ask(command)
        if python is None:
            continue
        if not python.supported:
            found[python.version] = f"{python.version} ({python.path})"
        elif not python.whole:
            package = "python" + python.version.rsplit(".", 1)[0] + "-venv"
            found[python.version] = (
                f"{python.version} ({python.path}) without its venv module: on Debian and Ubuntu, install {package}"
            )
        else:
            return python
    raise SetupError(
        f"Z-Image Studio needs {SUPPORTED}. Found: {'; '.join(found.values()) or 'none that runs'}.\n"
        "Install one of these (Debian and Ubuntu: apt install python3 python3-venv; macOS: brew install python@3.12; "
        "Windows: winget install Python.Python.3.12), then run this again."
    )


# The build of torch


def wanted_build(asked: str, installed: str, platform: str, card: bool) -> str:
    """The build of torch to install: a folder of TORCH_INDEX, or "" for whatever pip gives by itself.

    pip's own is the CUDA build on Linux, the CPU build on Windows and the only one there is on macOS. What
    Z_IMAGE_TORCH asks for goes first, then what is installed already, so that the choice is made once.
    """
    if asked not in ("", "auto", "cpu", "cuda", "pip") and not re.match(r"(cu|rocm|xpu)[\d.]*$", asked):
        raise SetupError(
            f"Z_IMAGE_TORCH={asked} is not possible; allowed: auto, cpu, cuda, pip, or a build that PyTorch publishes, "
            "such as cu126."
        )
    if platform == "darwin" or asked == "pip":
        return ""
    if asked in ("", "auto"):
        if asked == "" and installed:
            return "" if installed == "pip" else installed
        asked = "cuda" if card and platform == "win32" else "pip"
    if asked == "cuda":
        return CUDA_BUILD if platform == "win32" else ""
    return "" if asked == "pip" else asked


def has_card(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether an NVIDIA driver answers, without any package: by the tool that comes with every driver."""
    import shutil

    beside = os.path.join(environ.get("SYSTEMROOT", ""), "System32", "nvidia-smi.exe")
    tool = shutil.which("nvidia-smi", path=environ.get("PATH")) or beside
    try:
        done = subprocess.run(
            [tool, "-L"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0 and b"GPU" in done.stdout


def index_arguments(build: str) -> list[str]:
    """pip's arguments for a build: `2.14.1+cpu` fits `torch==2.14.1`, and goes before a version without a suffix."""
    index = os.environ.get("Z_IMAGE_TORCH_INDEX") or TORCH_INDEX
    return ["--extra-index-url", f"{index}/{build}"] if build else []


# The environment and its stamp


def venv_python(venv: Path) -> Path:
    """Where the environment's interpreter lies."""
    return venv / ("Scripts/python.exe" if WINDOWS else "bin/python")


def fingerprint(venv: Path) -> dict[str, str] | None:
    """What the environment stands on, as far as it shows without starting it; None where it cannot work.

    The base Python may be removed or replaced under an environment by a system upgrade. A new patch release of it
    is fine, so only the name of the file behind the link counts (python3.11).
    """
    try:
        python = venv_python(venv).resolve(strict=True)
        lines = (venv / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
    except (OSError, RuntimeError):
        return None
    config = dict(line.split(" = ", 1) for line in lines if " = " in line)
    if not os.path.isdir(config.get("home", "")):
        return None
    machine = os.environ.get("PROCESSOR_ARCHITECTURE", "") if WINDOWS else os.uname().machine
    return {"python": config.get("version", ""), "file": python.name, "platform": f"{sys.platform}-{machine}"}


def digests(root: Path, extras: Sequence[str]) -> dict[str, str]:
    """SHA-256 of each lock file that is wanted."""
    names = [TORCH_LOCK, *(LOCKS[extra] for extra in ("", *extras))]
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in names}


def read_stamp(venv: Path) -> dict[str, str] | None:
    """The locks that the environment holds, by name; None where it was cut short or no longer stands."""
    try:
        stamp = json.loads(stamp_path(venv).read_text(encoding="utf-8"))
        locks, base = stamp["locks"], stamp["base"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return locks if base == fingerprint(venv) else None


def write_stamp(venv: Path, locks: dict[str, str]) -> None:
    """Record, in one step, that the environment is whole and holds `locks`."""
    new = stamp_path(venv).with_suffix(".new")
    new.write_text(json.dumps({"base": fingerprint(venv), "locks": locks}, indent=1), encoding="utf-8")
    os.replace(str(new), str(stamp_path(venv)))


def stamp_path(venv: Path) -> Path:
    """Where the stamp lies: inside the environment, so that removing it removes the stamp."""
    return venv / "stamp.json"


def holds(stamp: dict[str, str] | None, wanted: dict[str, str]) -> bool:
    """Whether everything wanted is there; more than that does no harm."""
    return stamp is not None and all(stamp.get(name) == digest for name, digest in wanted.items())


# Making it


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[int]:
    """Hold the set-up lock, waiting for another set-up to end. Yields its descriptor.

    The lock is the system's, on an open file, so a killed holder leaves nothing behind. pip inherits the
    descriptor: should only the parent be killed, a pip that lives on still keeps others out.
    """
    with open(path, "a+b") as file:
        if sys.platform == "win32":  # spelt out, as type checkers know it
            import msvcrt
            import time

            while True:
                try:
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                    break
                except OSError:
                    time.sleep(0.5)
        else:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                show("Another set-up of this folder is running; waiting for it.")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def call(command: Sequence[str], lock: int) -> int:
    """Run a step of the set-up, its output on stderr, and return its exit code."""
    return subprocess.call(
        command, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno(), pass_fds=() if WINDOWS else (lock,)
    )


def wishes(root: Path, extras: Sequence[str], stamp: dict[str, str] | None, card: Callable[[], bool]) -> dict[str, str]:
    """What the environment is to hold: the locks' digests, and the build of torch."""
    asked, installed = os.environ.get("Z_IMAGE_TORCH", ""), (stamp or {}).get(TORCH, "")
    needs_look = sys.platform == "win32" and (asked == "auto" or not (asked or installed))
    build = wanted_build(asked, installed, sys.platform, needs_look and card())
    return {**digests(root, extras), TORCH: build or "pip"}


def set_up(root: Path, extras: Sequence[str] = ()) -> Path:
    """Make .venv hold the wanted locks, with no more work than that takes, and return its interpreter."""
    venv = root / ".venv"
    stamp = read_stamp(venv)
    if holds(stamp, wishes(root, extras, stamp, has_card)):
        return venv_python(venv)
    with only_one(root / ".venv.lock") as lock:
        stamp = read_stamp(venv)
        wanted = wishes(root, extras, stamp, has_card)
        if holds(stamp, wanted):  # by the set-up we waited for
            return venv_python(venv)
        if stamp is not None and stamp.get(TORCH, wanted[TORCH]) != wanted[TORCH]:
            show(f"Another build of torch is asked for ({wanted[TORCH]}): .venv is made again.")
            stamp = None  # pip takes one build of a version for another
        if stamp is None:
            make_venv(venv, lock)
        with contextlib.suppress(FileNotFoundError):
            stamp_path(venv).unlink()
        show("Installing the pinned packages into .venv; the first time this takes some minutes and several GB.")
        code = install(venv_python(venv), root, extras, "" if wanted[TORCH] == "pip" else wanted[TORCH], lock)
        if code != 0:
            if stamp is not None and code > 0:
                # pip gave up by itself (a negative code is a signal's), so each package is whole, old or new: the
                # next call goes on from here.
                write_stamp(venv, {TORCH: wanted[TORCH]})
            free = disk_free_gb(root)
            raise SetupError(
                "The set-up stopped because pip failed; its last lines are above.\n"
                f"Usual reasons: no network, a proxy that pip does not know, or a full disk ({free:.1f} GB are free "
                "here). Run the same command again when that is fixed: what pip has fetched is kept."
            )
        write_stamp(venv, wanted)
    return venv_python(venv)


def install(python: Path, root: Path, extras: Sequence[str], build: str, lock: int) -> int:
    """Install the locks by pip, and return its exit code.

    With hashes pip takes nothing without one, so what torch's build needs beyond the locks comes in a call of its own.
    The locks hold everything else that anything needs, hence --no-deps.
    """
    pip = [str(python), "-m", "pip", "install"]
    files = [argument for extra in ("", *extras) for argument in ("-r", str(root / LOCKS[extra]))]
    code = call([*pip, "--require-hashes", "--no-deps", *files], lock)
    return code or call([*pip, *index_arguments(build), "-r", str(root / TORCH_LOCK)], lock)


def make_venv(venv: Path, lock: int) -> None:
    """Make an empty environment in place of whatever is there."""
    python = find_python(candidates())
    show(f"Making .venv with Python {python.version} ({python.path}).")
    if call([python.path, "-m", "venv", "--clear", str(venv)], lock) != 0:
        raise SetupError(
            f"The set-up stopped because the environment {venv} could not be made; the reason is above.\n"
            "If a Z-Image Studio is running from this folder, end it. Then remove .venv and run this again."
        )


def disk_free_gb(path: Path) -> float:
    """Free space where `path` lies."""
    import shutil

    return shutil.disk_usage(path).free / 1e9


# Starting


def start(python: Path, arguments: Sequence[str]) -> NoReturn:
    """Become `python` with `arguments`; on Windows, which cannot, run it and pass its exit code on."""
    command = [str(python), *arguments]
    if not WINDOWS:
        os.execv(command[0], command)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the script, which gets it too
    sys.exit(subprocess.call(command))


def main(arguments: Sequence[str]) -> None:
    """Read our own options, set up, and start the script if one is named."""
    rest, extras = list(arguments), []
    while rest[:1] == ["--extra"]:
        if len(rest) < 2 or rest[1] not in LOCKS:
            raise SetupError("--extra takes one word: test.")
        extras.append(rest[1])
        rest = rest[2:]
    python = set_up(Path(__file__).resolve().parent, extras)
    if rest:
        start(python, rest)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SetupError as error:
        show(str(error))
        sys.exit(1)
    except OSError as error:
        show(f"The set-up stopped: {error}.")
        sys.exit(1)
    except KeyboardInterrupt:
        show("Stopped. Run the same command again to go on.")
        sys.exit(130)
