"""The guide's examples for programs: run as they stand, with the address of the tests' server."""

import re
from pathlib import Path

import pytest

from core import metadata
from tests.helpers.serving import server

GUIDE = Path(__file__).parent.parent.parent / "docs" / "guide.md"


def test_examples_for_openai_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = GUIDE.read_text(encoding="utf-8").split("### OpenAI's clients\n")[1].split("\n### ")[0]
    examples = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert len(examples) == 2
    for example in examples:
        exec(example.replace("http://127.0.0.1:7860/", server().url), {})
    assert metadata.read_picture(tmp_path / "apple-2.png").values["seed"] == 8
    assert metadata.read_picture(tmp_path / "image_edit.completed.png").mode == "controlnet"
