"""The page's languages: a locale file has every template that can reach the page, and no stray one."""

import ast
import io
import itertools
import json
import re
import string
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from babel.messages.extract import extract

import mini.config
import web.server  # noqa: F401 - and with it every module whose texts reach the page
from core.errors import QueueFull, RequestError, StudioError
from core.events import Failure, Stage
from core.messages import Message
from core.request import MODELS, MODES, PREPROCESSORS, UPSCALERS, Preprocess, Request, TextToImage
from core.sizes import IMAGE_SIZES
from diffusion.device import DeviceKind
from diffusion.memory import memory_plan
from hub import huggingface, remote
from images import reading
from mini.notes import EXAMPLES
from web import language, real_model, words
from web.words import failed, idle, underway

ROOT = Path(__file__).parent.parent.parent
FILES = sorted(language.LOCALES.glob("*.json"))
LOCALES = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)

SOURCES = sorted(
    path for face in ROOT.glob("*/__init__.py") if face.parent.name != "train_mini" for path in face.parent.glob("*.py")
)
# Their texts are for the command line and for those who run the server.
NOT_ON_THE_PAGE = {
    *("hub/command.py", "hub/modelscope.py", "hub/links.py", "hub/places.py", "hub/space_cache.py", "hub/verify.py"),
    *(
        "web/listening.py",
        "web/mcp.py",
        "web/mcp_http.py",
        "diffusion/device.py",
        "diffusion/measure.py",
        "web/allowed_hosts.py",
        "web/server.py",
        "web/theme.py",
    ),
}
OF_OPERATORS = {"a number of GB above 0, such as 12"}
AS_IT_IS = {
    *("ControlNet", "LoRA", "CFG", "Z-Image", "Lumina Image 2.0"),  # called the same everywhere
    "Stable Diffusion XL" + "Stable Diffusion",  # Babel joins the two ends of a condition
    "{field}: {value} is not possible; allowed: {allowed}",  # the page words it itself
}


def errors(kind: type[StudioError] = StudioError) -> Iterator[str]:
    """The names of the errors whose first argument is a template: those that do not word themselves."""
    for known in kind.__subclasses__():
        if "__init__" not in vars(known):
            yield known.__name__
        yield from errors(known)


KEYWORDS = {
    **dict.fromkeys(errors(), (1,)),
    **dict.fromkeys(("say", "fixed", "__init__"), (1,)),
    **dict.fromkeys(("Message", "refused", "Stage"), (2,)),
    "RequestError": (3,),
}


def templates(path: Path) -> Iterator[str]:
    """What a module's calls are given as templates, and what it calls `text`: a template with a line of its own."""
    source = path.read_bytes()
    for _, text, _, _ in extract("python", io.BytesIO(source), keywords=KEYWORDS):
        yield from (text,) if isinstance(text, str) else text
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Assign(targets=[ast.Name("text")], value=ast.Constant(str() as text)):
                yield text


def declared() -> Iterator[str]:
    """What tables declare: labels and help lines, what fields take, titles, and the page's own tables."""
    modes: list[type[Request]] = [*MODES.values(), Preprocess]
    for mode in modes:
        for name, field in mode.model_fields.items():
            if name != "weights":  # the page offers no choice
                yield words.field_name(name, language.english)
                yield field.description or ""
                yield getattr(mode.allowed(name), "text", "")  # else it lists values
    yield from (facts.title for facts in PREPROCESSORS.values())
    yield from (facts.title for facts in UPSCALERS.values())
    for preprocessor in PREPROCESSORS.values():
        yield preprocessor.help
    for model in MODELS.values():
        yield f"LoRA for {model.title}"
    yield from words.STAGES.values()
    yield from (real_model.TITLE, *real_model.EDITIONS.values())
    yield from (remote.GOES_ON, *huggingface.MEANINGS.values())
    for texts in (*words.WEIGHTS.values(), words.WEIGHTS_MISSING):
        yield from texts


@cache
def on_the_page() -> frozenset[str]:
    """Every template that can reach the page."""
    modules = [path for path in SOURCES if path.relative_to(ROOT).as_posix() not in NOT_ON_THE_PAGE]
    found = {*declared(), *(text for path in modules for text in templates(path))}
    return frozenset(text for text in found if re.search("[a-z]{2}", text)) - OF_OPERATORS - AS_IT_IS


def i18n(html: str) -> str:
    """The text that the browser translates in a piece of the page."""
    key: str = json.loads(re.findall(r"__i18n__({.*})", html)[0])["key"]
    return key


# Put together when the page is made.
COMPOSED = {
    *(words.field_name(name, language.english) for name in ("size", "file")),
    f"Width and height: {IMAGE_SIZES['mini']}.",
    i18n(idle("Describe a picture", "Generate")),
    i18n(idle("Choose an image, describe a picture", "Generate")),
    i18n(idle("Choose a picture", "Upscale")),
    # What the seed adds to a prompt for the miniature: the first name of each.
    *(names[0] for group in ("sizes", "ways", "places") for names in mini.config.vocabulary()[group].values()),
}


def texts_of(path: Path) -> dict[str, str]:
    texts: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["texts"]
    return texts


def test_templates_are_found() -> None:
    found = on_the_page()
    assert "{limit} requests are waiting already; try again in a moment" in found  # of an error that words itself
    assert "The picture has {frames} frames or pages; the first one is used." in found  # assigned to `text`
    assert "a whole number from {low} to {high}" in found  # declared by a request
    assert "Roll the dice" in found
    assert len(found) > 200


@LOCALES
def test_a_locale_has_every_template(path: Path) -> None:
    assert on_the_page() - texts_of(path).keys() == set()


@LOCALES
def test_a_locale_has_no_stray_template(path: Path) -> None:
    strings = {
        node.value
        for source in SOURCES
        for node in ast.walk(ast.parse(source.read_bytes()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert texts_of(path).keys() - strings - on_the_page() - COMPOSED == set()


def places(template: str) -> list[tuple[str, str]]:
    """The places of a template, each with how its value is written."""
    return sorted((name, spec or "") for _, name, spec, _ in string.Formatter().parse(template) if name is not None)


@LOCALES
def test_a_translation_keeps_the_places(path: Path) -> None:
    for template, translated in texts_of(path).items():
        assert places(template) == places(translated), template


@LOCALES
def test_examples_work_in_every_language(path: Path) -> None:
    texts = texts_of(path)
    for kind, examples in EXAMPLES.items():
        assert all(example in texts for example in examples)
        assert max(map(len, examples)) <= 60  # what Gradio shows of one
        assert kind != "mini" or not any(mini.config.unknown_words(texts[example]) for example in examples)


def test_what_a_field_takes_is_worded_with_its_numbers() -> None:
    with pytest.raises(RequestError) as caught:
        TextToImage.parse(prompt="a fox", steps=0)
    assert "步数不能是 0。可以是：1 到 100 之间的整数。" in failed(caught.value, language.say_in("zh-CN"))
    assert failed(caught.value) == ('<p class="failed">Steps cannot be 0. Possible: a whole number from 1 to 100.</p>')


def test_errors_and_notes_are_worded_with_their_values() -> None:
    chinese = language.say_in("zh")
    assert "已有 32 个请求在排队" in failed(QueueFull(32), chinese)
    note = Message("first_frame", "The picture has {frames} frames or pages; the first one is used.", frames=3)
    assert chinese(note) == "图片有 3 帧或页，使用第一帧。"
    assert language.english(note) == str(note)


def test_a_message_inside_a_message_is_worded_too() -> None:
    chinese = language.say_in("zh")
    seen = Message("flat", "the VAE made one plain colour of latents that vary")
    assert "VAE 把有变化的潜变量变成了单一颜色" in underway(
        Stage("safe mode", Message("safe_mode", "because {seen}", seen=seen)), chinese, None, ""
    )
    plan = [
        Message("memory", "what does not stay waits on the disk"),
        Message("memory", "the transformer stays in memory"),
    ]
    assert chinese(Message("memory", "Memory: {plan}", plan=plan)) == (
        "内存：其余部分存放在磁盘上；Transformer 常驻内存"
    )
    assert "预计需要" in underway(Stage("estimating", "3 s"), chinese, None, "")


def test_every_memory_plan_is_worded() -> None:
    """Rows of a table hold their templates as data, where no search for messages finds them."""
    known = texts_of(language.LOCALES / "zh.json").keys()
    devices: tuple[DeviceKind, ...] = ("cuda", "mps", "cpu")
    for kind, gigabytes, host, mode in itertools.product(
        devices, (2, 8, 16, 24, 32, 48, 80), (8, 64), ("generate", "controlnet")
    ):
        size = gigabytes << 30
        for tighter in (0, 1):
            reasons = memory_plan(kind, size, None, host << 30, mode, tighter=tighter).reasons
            assert {message.text for reason in reasons for message in within(reason)} <= known


def within(message: Message) -> Iterator[Message]:
    """Yield a message and those that are values of it."""
    yield message
    for value in message.values.values():
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, Message):
                yield from within(part)


def test_a_real_note_about_a_cut_picture_is_worded() -> None:
    from PIL import Image

    (note,) = reading.fit(Image.new("RGB", (1000, 1010)), IMAGE_SIZES["full"]).notes
    assert "裁去" in language.say_in("zh")(note)


def test_what_visitors_write_is_never_translated() -> None:
    chinese = language.say_in("zh")
    text = "The LoRA was trained on {trained}; with {used} it may do less, or harm."
    assert "Steps" in chinese(Message("lora_base", text, trained="Steps", used="Depth"))
    assert "不能是 Depth" in failed(Failure.of(RequestError("file", "Depth", "a PNG file")), chinese)


def test_an_unknown_language_is_english() -> None:
    assert language.say_in("xx-YY")("Cancel") == "Cancel"
    assert language.say_in("zh-HK")("Cancel") == "取消"  # its main language


def test_adding_a_language_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"name": "Deutsch", "tags": ["de"], "texts": {"Cancel": "Abbrechen", "{steps} steps": "{steps} Schritte"}}
    (tmp_path / "de.json").write_text(json.dumps(texts), encoding="utf-8")
    monkeypatch.setattr(language, "LOCALES", tmp_path)
    for cached in (language.locales, language.say_in):
        cached.cache_clear()
    try:
        assert language.say_in("de-AT")("Cancel") == "Abbrechen"
        assert language.say_in("de")("{steps} steps", steps=8) == "8 Schritte"
        assert language.for_gradio().translations["de"]["Cancel"] == "Abbrechen"
    finally:
        monkeypatch.undo()
        for cached in (language.locales, language.say_in):
            cached.cache_clear()
