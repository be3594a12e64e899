"""What is printed, on consoles of other encodings and into pipes and disks that take no more."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import cli
from tests.helpers import pictures

ROOT = Path(__file__).parent.parent.parent
POSIX = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's devices")

PROMPT = "猫 × naïve fox"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two pictures in it; its name, too, has letters that not every console has."""
    folder = tmp_path / "图"
    folder.mkdir()
    pictures.png(folder / "猫.png", parameters=f"{PROMPT}\nSteps: 8, Seed: 3, Size: 128x128")
    Image.effect_noise((64, 64), 60).convert("RGB").save(folder / "in.png")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    (folder / "模型").mkdir()
    monkeypatch.setenv("Z_IMAGE_MODELS", str(folder / "模型"))
    return folder


def code_of(*arguments: str) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as left:
        assert isinstance(left.code, int)
        return left.code


COMMANDS = {
    "help": ("--help",),
    "help of a command": ("generate", "--help"),
    "inspect": ("inspect", "猫.png"),
    "inspect as json": ("inspect", "猫.png", "--json"),
    "models": ("models",),
    "models list": ("models", "list", "--json"),
    "nothing to verify": ("models", "verify", "--json"),
    "preprocess": (
        "preprocess",
        "--image",
        "in.png",
        "--preprocessor",
        "gray",
        "--weights",
        "mini",
        "--out",
        "猫2.png",
    ),
    "a bad request as json": ("generate", "狐", "--width", "狐", "--json"),
    "doctor": ("doctor", "--json", "--device", "cpu"),
}


# --- pipes that close


@POSIX
@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_pipe_that_closes_ends_a_command_quietly(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as nobody_reads:
        monkeypatch.setattr(sys, "stdout", nobody_reads)
        assert code_of(*COMMANDS[name]) == 128 + 13
    assert "Traceback" not in capsys.readouterr().err


@POSIX
@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_process_whose_pipe_closes_leaves_nothing_behind(closed: str) -> None:
    """Python itself writes what is left once more when it ends, and complains."""
    reader, writer = os.pipe()
    os.close(reader)
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, closed: writer}
    done = subprocess.run([sys.executable, ROOT / "cli.py", "generate", "x", "--width", "1", "--json"], **streams)
    os.close(writer)
    assert done.returncode == 141
    if closed == "stdout":
        assert done.stderr.decode().splitlines()[1:] == []


@LINUX
@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", ["inspect as json", "models", "help"])
def test_output_that_finds_no_room_is_told_in_a_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert code_of(*COMMANDS[name]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("standard output could not be written (No space left")


# --- consoles of other encodings


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk", "utf-16"])
@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"doctor"}))
def test_any_command_prints_on_any_console(
    name: str, encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(tmp_path / "printed", "w", encoding=encoding) as console:
        monkeypatch.setattr(sys, "stdout", console)
        code = code_of(*COMMANDS[name])
    assert code in (0, 2, 3)
    assert "Traceback" not in capsys.readouterr().err
    printed = (tmp_path / "printed").read_text(encoding)
    if "--json" in COMMANDS[name]:
        facts = json.loads(printed)
        if name == "inspect as json":
            assert facts["request"]["prompt"] == PROMPT  # nothing is lost
    elif name == "inspect":
        assert ("naïve" if encoding not in ("ascii", "gbk") else "fox") in printed
        assert ("猫" if encoding.startswith(("gbk", "utf")) else "\\u732b") in printed
