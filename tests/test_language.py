"""The page's languages: every sentence of a locale file is one of the program's, and its values survive."""

import ast
import json
import re
from pathlib import Path

import pytest

import language
import ui_words
from errors import QueueFull, RequestError
from request import ControlNet, Note, TextToImage

ROOT = Path(__file__).parent.parent
FILES = sorted(language.FOLDER.glob("*.json"))


def sentences_of_the_program() -> set[str]:
    """Every string in the modules of the page, in the requests' help lines and in what a field takes."""
    found = set()
    for path in [
        *ROOT.glob("ui*.py"),
        *ROOT.glob("tab_*.py"),
        ROOT / "request.py",
        ROOT / "pipeline.py",
        ROOT / "engine.py",
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    for request in (TextToImage, ControlNet):
        found |= {re.sub(r"\d+(\.\d+)?", "#", request.allowed(name)) for name in request.model_fields}
    return found | {
        ui_words.idle("Describe a picture", "Generate"),
        ui_words.idle("Choose an image, describe a picture", "Generate"),
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_locale_translates_what_the_program_says(path: Path) -> None:
    locale, said = json.loads(path.read_text(encoding="utf-8")), sentences_of_the_program()
    computed = (
        "transformer (",
        "Width and height:",
        "# only with",
        "# to # in",
        "Width",
        "Height",
        "Describe",
        "Choose an image,",
    )
    strays = [text for text in locale["texts"] if text not in said and not text.startswith(computed)]
    assert strays == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_translation_keeps_the_values(path: Path) -> None:
    for sentence, translated in json.loads(path.read_text(encoding="utf-8"))["texts"].items():
        assert sorted(re.findall(r"\{\w+\}", sentence)) == sorted(re.findall(r"\{\w+\}", translated)), sentence
        assert sentence.count("#") == translated.count("#") or "#" in sentence, sentence


def test_what_a_field_takes_is_worded_with_its_numbers() -> None:
    with pytest.raises(RequestError) as caught:
        TextToImage.parse(prompt="a fox", steps=0)
    said = ui_words.failed(caught.value, language.say_in("zh-CN"))
    assert "1 到 100 之间的整数" in said
    assert ui_words.failed(caught.value) == (
        '<p class="failed">Steps takes a whole number from 1 to 100; 0 is not possible.</p>'
    )


def test_errors_and_notes_are_worded_by_their_code() -> None:
    chinese = language.say_in("zh")
    assert "已有 32 个请求在排队" in ui_words.failed(QueueFull(32), chinese)
    note = Note("unknown_words", "The miniature does not know: gramophone. It knows things.", {"words": ["gramophone"]})
    assert ui_words.noted(note, chinese) == "迷你模型不认识：gramophone。"
    assert ui_words.noted(note, language.english) == note.text


def test_an_unknown_language_is_english() -> None:
    assert language.say_in("xx-YY")("Cancel") == "Cancel"
    assert language.say_in("zh-HK")("Cancel") == "取消"  # its main language
