"""The command line in the tests' own process, for all that needs no process of its own: imports take seconds."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import cli

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `command_here("generate", "fox", cwd=folder)`; what it returns is what a process of its own would leave.

    Output is taken from the file descriptors, so that what native code prints counts too.
    """

    def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        given = [str(argument) for argument in arguments]
        capfd.readouterr()
        with monkeypatch.context() as patched:
            patched.chdir(cwd)
            # `--offline` sets it for good; set here, it is put back afterwards.
            patched.setenv("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", ""))
            try:
                code = cli.main(given)
            except SystemExit as left:
                assert isinstance(left.code, int)
                code = left.code
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(given, code, out, err)

    return run
