"""The guide's examples for programs: run as they stand, with the address of the tests' server."""

import json
import re
from pathlib import Path

import pytest

from cli import build_parser
from core import metadata
from tests.helpers.serving import server

GUIDE = Path(__file__).parent.parent.parent / "docs" / "guide.md"


def examples_of(heading: str, language: str = "python") -> list[str]:
    section = GUIDE.read_text(encoding="utf-8").split(f"### {heading}\n")[1].split("\n### ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


def test_examples_for_openai_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = examples_of("OpenAI's clients")
    assert len(examples) == 2
    for example in examples:
        exec(example.replace("http://127.0.0.1:7860/", server().url), {})
    assert metadata.read_picture(tmp_path / "apple-2.png").values["seed"] == 8
    assert metadata.read_picture(tmp_path / "image_edit.completed.png").mode == "controlnet"


def test_examples_for_assistants(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = examples_of("Assistants (MCP)")
    exec(example.replace("http://127.0.0.1:7860/", server().url), {})
    *told, large = capsys.readouterr().out.splitlines()
    assert "seed 7" in told[1]
    assert "/v1/files/" in large
    (configuration,) = examples_of("Assistants (MCP)", "json")
    (started,) = json.loads(configuration)["mcpServers"].values()
    assert build_parser().parse_args(started["args"][1:]).command == "mcp"
