"""The set-up: run.sh, run.bat, test.sh, install.py and the lock files.

Each project here is a copy of the real scripts whose locks ask for tiny wheels made on the spot, so that real
environments are made by the real pip, without a network, in seconds.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import install

First = tuple["Project", Path, subprocess.CompletedProcess[str]]

ROOT = Path(__file__).parent.parent
BASH = shutil.which("bash") or "bash"
ECHO = """\
import importlib.metadata, json, os, sys
names = {"tiny", "helper"}
found = {d.name: d.version for d in importlib.metadata.distributions() if d.name in names}
print(json.dumps({"arguments": sys.argv[1:], "folder": os.getcwd(), "packages": found}))
sys.exit(7)
"""


def make_wheel(folder: Path, name: str, version: str) -> None:
    """A wheel with nothing but its name and version."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


class Project:
    """A folder with the real scripts, small locks and a command line that tells how it was started."""

    def __init__(self, root: Path, wheels: Path) -> None:
        self.root = root
        self.wheels = wheels

    @property
    def stamp(self) -> Path:
        return self.root / ".venv" / "stamp.json"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a call: pip sees the wheels of the test and nothing else."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "VIRTUAL_ENV"))}
        return {**kept, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull}

    def lock(self, text: str, name: str = "requirements.lock") -> None:
        """Write a lock, with the hash of the wheel where the test has one."""
        wheel = self.wheels / f"{text.replace('==', '-')}-py3-none-any.whl"
        known = hashlib.sha256(wheel.read_bytes() if wheel.exists() else b"").hexdigest()
        (self.root / name).write_text(f"{text} --hash=sha256:{known}\n")

    def run(
        self, *arguments: str, folder: Path | None = None, variables: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BASH, str(self.root / "run.sh"), *arguments],
            cwd=folder or self.root,
            env={**self.environment, **(variables or {})},
            capture_output=True,
            text=True,
        )

    def install(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(self.root / "install.py"), *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
        )


def new_project(root: Path, wheels: Path) -> Project:
    root.mkdir()
    for name in ("run.sh", "install.py"):
        shutil.copy(ROOT / name, root)
    (root / "cli.py").write_text(ECHO)
    project = Project(root, wheels)
    project.lock("tiny==1.0")
    project.lock("helper==1.0", "requirements-test.lock")
    (root / install.TORCH_LOCK).write_text("torch==1.0\n")
    return project


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    for name, version in (("tiny", "1.0"), ("tiny", "2.0"), ("helper", "1.0"), ("torch", "1.0")):
        make_wheel(folder, name, version)
    return folder


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> First:
    """A project with a space in its path, set up by its first call, made from another folder."""
    project = new_project(tmp_path_factory.mktemp("first") / "Z Image Studio", wheels)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    return project, elsewhere, project.run("generate", "a red apple", "", "--json", folder=elsewhere)


@pytest.fixture
def ready(first: First, tmp_path: Path) -> Project:
    """A copy of the set-up project, to be damaged."""
    copy = tmp_path / "Z Image Studio"
    shutil.copytree(first[0].root, copy, symlinks=True)
    return Project(copy, first[0].wheels)


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What the command line told, which is all that may be on stdout."""
    assert done.returncode == 7, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def replace_pip(project: Project, code: str) -> None:
    """Have `code` run whenever pip is called."""
    (main,) = project.root.glob(".venv/lib/python*/site-packages/pip/__main__.py")
    main.write_text(code)


# Starting


def test_first_call_sets_up_and_passes_everything_on(first: First) -> None:
    project, elsewhere, done = first
    assert answer(done) == {
        "arguments": ["generate", "a red apple", "", "--json"],
        "folder": str(elsewhere),
        "packages": {"tiny": "1.0"},
    }
    assert "Making .venv with Python 3." in done.stderr
    assert json.loads(project.stamp.read_text())["locks"].keys() == {
        "requirements.lock",
        "requirements-torch.lock",
        "torch",
    }


def test_no_arguments_mean_the_page(ready: Project) -> None:
    assert answer(ready.run())["arguments"] == ["serve"]


def test_second_call_prints_nothing_and_calls_no_pip(ready: Project) -> None:
    replace_pip(ready, "raise SystemExit('pip was called')")
    done = ready.run("doctor")
    assert answer(done)["packages"] == {"tiny": "1.0"}
    assert done.stderr == ""
    # The check can fail: with another lock the broken pip is called.
    ready.lock("tiny==2.0")
    assert "pip was called" in ready.run("doctor").stderr


def test_a_relative_name_of_the_script_works(ready: Project) -> None:
    done = subprocess.run([BASH, "run.sh", "x"], cwd=ready.root, env=ready.environment, capture_output=True, text=True)
    assert answer(done)["folder"] == str(ready.root)


# Changes of the locks


def test_changed_lock_is_installed(ready: Project) -> None:
    ready.lock("tiny==2.0")
    assert answer(ready.run())["packages"] == {"tiny": "2.0"}


def test_test_extra_is_added_and_plain_calls_still_start_at_once(ready: Project) -> None:
    assert ready.install("--extra", "test").returncode == 0
    replace_pip(ready, "raise SystemExit('pip was called')")
    done = ready.run()
    assert answer(done)["packages"] == {"tiny": "1.0", "helper": "1.0"}
    assert done.stderr == ""


def test_unknown_extra_is_refused(ready: Project) -> None:
    done = ready.install("--extra", "tests")
    assert done.returncode == 1
    assert done.stderr == "--extra takes one word: test.\n"


# Damage


def lose_stamp(project: Project) -> None:
    project.stamp.unlink()


def cut_stamp(project: Project) -> None:
    project.stamp.write_text(project.stamp.read_text()[:40])


def lose_interpreter(project: Project) -> None:
    for link in project.root.glob(".venv/bin/python*"):
        link.unlink()
        link.symlink_to("/nowhere/python3")


def lose_base_python(project: Project) -> None:
    config = project.root / ".venv" / "pyvenv.cfg"
    config.write_text(re.sub("home = .*", "home = /nowhere/bin", config.read_text()))


@pytest.mark.parametrize("damage", [lose_stamp, cut_stamp, lose_interpreter, lose_base_python])
def test_half_made_environment_is_not_trusted(ready: Project, damage: Callable[[Project], None]) -> None:
    assert install.read_stamp(ready.root / ".venv") is not None
    damage(ready)
    assert install.read_stamp(ready.root / ".venv") is None


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lose_stamp, lose_interpreter])
def test_half_made_environment_is_made_again(ready: Project, damage: Callable[[Project], None]) -> None:
    (package,) = ready.root.glob(".venv/lib/python*/site-packages/tiny-1.0.dist-info")
    shutil.rmtree(package)
    damage(ready)
    done = ready.run()
    assert answer(done)["packages"] == {"tiny": "1.0"}
    assert "Making .venv" in done.stderr


def test_environment_of_another_python_is_not_trusted(ready: Project) -> None:
    stamp = json.loads(ready.stamp.read_text())
    assert install.read_stamp(ready.root / ".venv") == stamp["locks"]
    for key in ("python", "file", "platform"):
        ready.stamp.write_text(json.dumps({**stamp, "base": {**stamp["base"], key: "other"}}))
        assert install.read_stamp(ready.root / ".venv") is None


def test_failing_pip_is_told_and_leaves_no_stamp(tmp_path: Path, wheels: Path) -> None:
    project = new_project(tmp_path / "project", wheels)
    project.lock("absent==1.0")
    done = project.run("generate", "x")
    assert (done.returncode, done.stdout) == (1, "")
    printed_by_pip, printed_by_us = done.stderr.split(
        "The set-up stopped because pip failed; its last lines are above."
    )
    assert "No matching distribution found for absent==1.0" in printed_by_pip
    assert "Run the same command again" in printed_by_us
    assert not project.stamp.exists()


def test_another_file_of_the_same_version_is_not_installed(tmp_path: Path, wheels: Path) -> None:
    project = new_project(tmp_path / "project", shutil.copytree(wheels, tmp_path / "wheels"))
    with zipfile.ZipFile(project.wheels / "tiny-1.0-py3-none-any.whl", "a") as wheel:
        wheel.writestr("tiny.py", "")
    done = project.run("generate", "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert "PACKAGES DO NOT MATCH THE HASHES" in done.stderr
    assert not project.stamp.exists()


def test_failing_pip_spares_a_whole_environment(ready: Project) -> None:
    """Offline with a new lock: the next call goes on from what is there instead of making it all again."""
    ready.lock("absent==1.0")
    assert ready.run().returncode == 1
    assert ready.run().returncode == 1  # the stamp that is left holds no lock
    ready.lock("tiny==1.0")
    done = ready.run()
    assert answer(done)["packages"] == {"tiny": "1.0"}
    assert "Making .venv" not in done.stderr


@pytest.mark.parametrize(("victim", "code"), [("os.getppid()", -signal.SIGKILL), ("os.getpid()", 1)])
def test_kill_of_the_set_up_or_of_its_pip_leaves_no_stamp(ready: Project, victim: str, code: int) -> None:
    replace_pip(ready, f"import os, signal; os.kill({victim}, signal.SIGKILL)")
    ready.lock("tiny==2.0")
    assert ready.run().returncode == code
    assert not ready.stamp.exists()


# Two at once


def test_two_first_calls_make_one_environment(tmp_path: Path, wheels: Path) -> None:
    project = new_project(tmp_path / "project", wheels)
    calls = [
        subprocess.Popen(
            [BASH, str(project.root / "run.sh"), str(number)],
            env=project.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    output = [call.communicate(timeout=240) for call in calls]
    assert [call.returncode for call in calls] == [7, 7, 7], output
    assert [json.loads(told)["packages"] for told, _ in output] == [{"tiny": "1.0"}] * 3
    assert sum(stderr.count("Making .venv") for _, stderr in output) == 1
    assert sum(stderr.count("Installing the pinned packages") for _, stderr in output) == 1


@pytest.fixture
def killed_holder(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A set-up that was killed while its step lives on: the lock's file and the step's process id."""
    path = tmp_path / "lock"
    step = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]
    code = f"import install\nwith install.only_one({str(path)!r}) as lock: install.call({step!r}, lock)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True) as holder:
        assert holder.stderr is not None
        survivor = int(holder.stderr.readline())
        holder.kill()
        holder.wait(timeout=60)
        yield path, survivor


def test_lock_outlives_a_killed_set_up_only_as_long_as_its_pip(killed_holder: tuple[Path, int]) -> None:
    path, survivor = killed_holder
    with open(path, "rb") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.kill(survivor, signal.SIGKILL)
        fcntl.flock(file, fcntl.LOCK_EX)  # the system lets go; nothing has to be cleaned up


# Which Python


def an_interpreter(version: str, whole: bool = True) -> install.Interpreter:
    return install.Interpreter(version, whole, f"/usr/bin/python{version}")


@pytest.mark.parametrize(
    ("versions", "chosen"),
    [
        (["3.11.0"], "3.11.0"),
        (["3.9.2", "3.13.9"], "3.13.9"),
        (["3.14.0", "3.12.1"], "3.12.1"),
        ([None, "2.7.18", "3.11.7", "3.12.0"], "3.11.7"),
    ],
)
def test_first_supported_python_is_taken(versions: list[str | None], chosen: str) -> None:
    found = iter([an_interpreter(version) if version else None for version in versions])
    assert install.find_python([["python"]] * len(versions), lambda command: next(found)).version == chosen


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (an_interpreter("3.9.2"), "Found: 3.9.2 (/usr/bin/python3.9.2)."),
        (an_interpreter("3.14.0"), "Found: 3.14.0 (/usr/bin/python3.14.0)."),
        (
            an_interpreter("3.11.2", whole=False),
            "without its venv module: on Debian and Ubuntu, install python3.11",
        ),
        (None, "Found: none that runs."),
    ],
)
def test_unsuitable_pythons_are_named(found: install.Interpreter | None, sentence: str) -> None:
    with pytest.raises(install.SetupError) as caught:
        install.find_python([["python3"], ["python"]], lambda command: found)
    assert "needs Python 3.11, 3.12 or 3.13." in str(caught.value)
    assert sentence in str(caught.value)


def test_probe_tells_a_real_python_from_a_stub(tmp_path: Path) -> None:
    real = install.probe([sys.executable])
    assert real is not None
    assert real.whole
    assert real.version == "{}.{}.{}".format(*sys.version_info[:3])
    stub = tmp_path / "python3"
    stub.write_text("#!/bin/sh\nexit 1\n")
    stub.chmod(0o755)
    assert install.probe([str(stub)]) is None
    assert install.probe([str(tmp_path / "absent")]) is None


def test_windows_asks_its_launcher() -> None:
    assert ["py", "-3.12"] in install.candidates("win32")
    assert ["py", "-3.12"] not in install.candidates("linux")


def test_old_python_gets_a_sentence_from_run_sh(tmp_path: Path, wheels: Path) -> None:
    """A python3 that calls itself 3.9 is all there is on PATH."""
    project = new_project(tmp_path / "project", wheels)
    path = tmp_path / "bin"
    path.mkdir()
    (path / "old.py").write_text(
        "import sys\n"
        "sys.version_info, sys.executable = (3, 9, 2, 'final', 0), sys.argv.pop(1)\n"
        "del sys.argv[0]\n"
        "flags = ''\n"
        "while sys.argv[0].startswith('-'): flags += sys.argv.pop(0)\n"
        "source = sys.argv[0] if 'c' in flags else open(sys.argv[0]).read()\n"
        "exec(source, {'__name__': '__main__', '__file__': sys.argv[0]})\n"
    )
    (path / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{path}/old.py" "$0" "$@"\n')
    (path / "python3").chmod(0o755)
    done = project.run(variables={"PATH": str(path)})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Z-Image Studio needs Python 3.11, 3.12 or 3.13. Found: 3.9.2 (")
    assert not (project.root / ".venv").exists()


def test_no_python_gets_a_sentence_from_run_sh(tmp_path: Path, wheels: Path) -> None:
    done = new_project(tmp_path / "project", wheels).run(variables={"PATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (1, "")
    assert "no Python was found" in done.stderr


# The build of torch


@pytest.mark.parametrize(
    ("asked", "installed", "platform", "card", "build"),
    [
        ("", "", "linux", True, ""),  # pip's own is the CUDA build
        ("", "", "linux", False, ""),
        ("", "", "win32", True, install.CUDA_BUILD),
        ("", "", "win32", False, ""),
        ("", "", "darwin", False, ""),
        ("cpu", "", "linux", True, "cpu"),
        ("cpu", "", "win32", True, "cpu"),
        ("cpu", "", "darwin", False, ""),
        ("cuda", "", "win32", False, install.CUDA_BUILD),
        ("cuda", "cpu", "linux", False, ""),
        ("cu126", "", "linux", True, "cu126"),
        ("pip", "cpu", "win32", True, ""),
        # Without a wish, what was chosen once stays; with `auto` it is chosen again.
        ("", "cpu", "linux", True, "cpu"),
        ("", "pip", "win32", True, ""),
        ("auto", "cpu", "win32", True, install.CUDA_BUILD),
        ("auto", "cpu", "linux", True, ""),
    ],
)
def test_build_of_torch(asked: str, installed: str, platform: str, card: bool, build: str) -> None:
    assert install.wanted_build(asked, installed, platform, card) == build


def test_unknown_build_is_refused(ready: Project) -> None:
    done = ready.run(variables={"Z_IMAGE_TORCH": "gpu"})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Z_IMAGE_TORCH=gpu is not possible; allowed: auto, cpu, cuda, pip")


def test_the_cuda_build_is_the_one_that_the_locked_torch_is_made_for() -> None:
    import importlib.metadata

    asked = [line for line in importlib.metadata.requires("torch") or [] if line.startswith("cuda-toolkit")]
    if not asked:
        pytest.skip("this build of torch names no CUDA version")
    (version,) = re.findall(r"==(\d+)\.(\d+)", asked[0])
    assert f"cu{''.join(version)}" == install.CUDA_BUILD


@pytest.mark.parametrize(("script", "card"), [("echo 'GPU 0: A card'", True), ("echo none", False), ("exit 9", False)])
def test_a_card_is_seen_by_its_drivers_tool(script: str, card: bool, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    assert install.has_card({"PATH": str(tmp_path)}) is card


def test_no_tool_is_no_card(tmp_path: Path) -> None:
    assert not install.has_card({"PATH": str(tmp_path)})


@pytest.fixture
def with_indexes(tmp_path: Path, wheels: Path) -> tuple[Project, dict[str, str]]:
    """A project that needs a torch, an index that has its plain build, and one like PyTorch's with others."""
    project = new_project(tmp_path / "project", wheels)
    (project.root / "cli.py").write_text("import importlib.metadata\nprint(importlib.metadata.version('torch'))\n")
    for folder, version in (("plain", "1.0"), ("builds/cpu", "1.0+cpu"), ("builds/cu126", "1.0+cu126")):
        (tmp_path / folder / "torch").mkdir(parents=True)
        make_wheel(tmp_path / folder / "torch", "torch", version)
        name = f"torch-{version}-py3-none-any.whl"
        (tmp_path / folder / "torch" / "index.html").write_text(f'<a href="{name.replace("+", "%2B")}">{name}</a>')
    return project, {
        "PIP_NO_INDEX": "0",
        "PIP_INDEX_URL": (tmp_path / "plain").as_uri(),
        "Z_IMAGE_TORCH_INDEX": (tmp_path / "builds").as_uri(),
    }


@pytest.mark.slow
def test_the_asked_build_is_installed_and_stays(with_indexes: tuple[Project, dict[str, str]]) -> None:
    project, indexes = with_indexes
    assert project.run(variables=indexes).stdout == "1.0\n"
    done = project.run(variables={**indexes, "Z_IMAGE_TORCH": "cpu"})
    assert done.stdout == "1.0+cpu\n"
    assert ".venv is made again" in done.stderr
    replace_pip(project, "raise SystemExit('pip was called')")
    assert project.run().stdout == "1.0+cpu\n"
    assert project.run(variables={"Z_IMAGE_TORCH": "cpu"}).stdout == "1.0+cpu\n"


# The files themselves


def test_install_is_readable_by_an_old_python() -> None:
    ast.parse((ROOT / "install.py").read_text(), feature_version=(3, 8))


@pytest.mark.parametrize("name", ["run.sh", "test.sh", ".ci/run"])
def test_shell_scripts_stay_within_bash_3_2(name: str) -> None:
    subprocess.run([BASH, "-n", str(ROOT / name)], check=True)
    # An empty array counts as unset there, so arrays are out too.
    newer = r"(declare|local) -[An]|mapfile|readarray|coproc|\|&|&>>|\$\{\w+(,|\^|@)|\[\[ -v |\[@\]"
    assert re.findall(newer, (ROOT / name).read_text()) == []


def test_run_bat_has_the_line_ends_that_windows_needs() -> None:
    assert all(line.endswith(b"\r\n") for line in (ROOT / "run.bat").read_bytes().splitlines(keepends=True))


def pins(name: str) -> dict[str, Requirement]:
    lines = (line.split("#")[0].strip(" \\") for line in (ROOT / name).read_text().splitlines())
    wanted = map(Requirement, (line for line in lines if line and not line.startswith("--hash=")))
    return {requirement.name: requirement for requirement in wanted}


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-test.lock", "requirements-torch.lock"])
def test_locks_pin_exactly_and_name_no_place(name: str) -> None:
    locked = pins(name)
    assert (locked.keys() == {"torch", "torchvision"}) if "torch" in name else (len(locked) > 20)
    for requirement in locked.values():
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement
        assert requirement.url is None
    assert "://" not in (ROOT / name).read_text()
    # torch names the CUDA packages that its build needs; a lock that names them forces gigabytes on everyone.
    assert [package for package in locked if re.match("nvidia|cuda|triton", package)] == []


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-test.lock"])
def test_every_pin_has_hashes(name: str) -> None:
    """pip refuses one without; and a lock made without hashes would be one of none."""
    entries = re.split(r"^(?=[a-z])", (ROOT / name).read_text(), flags=re.MULTILINE)[1:]
    assert len(entries) == len(pins(name))
    assert [entry for entry in entries if not re.search(r"--hash=sha256:[0-9a-f]{64}$", entry, re.MULTILINE)] == []


def test_locks_fit_the_ranges_and_each_other() -> None:
    runtime, test = pins("requirements.lock"), pins("requirements-test.lock")
    for ranges, locked in (("requirements.txt", runtime), ("requirements-test.txt", test)):
        # A Space installs requirements.txt, with an older torch; that of the other machines is in a lock of its own.
        for name, wanted in ((name, wanted) for name, wanted in pins(ranges).items() if "torch" not in name):
            version = str(locked[name.replace("_", "-")].specifier).removeprefix("==")
            assert wanted.specifier.contains(version), f"{name} {version} is outside {ranges}"
    for name in runtime.keys() & test.keys():
        assert runtime[name].specifier == test[name].specifier
