"""The page's languages: a locale file has every sentence of the program that comes with a code, and no stray one."""

import ast
import itertools
import json
import re
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mini.config
from core import errors
from core.errors import QueueFull, RequestError
from core.events import Failure, Stage
from core.messages import Message
from core.request import MODELS, MODES, PREPROCESSORS, UPSCALERS, Preprocess, Request, TextToImage
from core.sizes import IMAGE_SIZES, WeightsKind
from diffusion import memory, sanity
from diffusion.device import DeviceKind, Dtype
from hub import inventory
from images import reading
from mini.notes import EXAMPLES
from web import language
from web.words import failed, idle, noted, underway

ROOT = Path(__file__).parent.parent.parent
FILES = sorted(language.LOCALES.glob("*.json"))

# Modules whose sentences reach the page. The others' are for the command line and for those who run the server.
MODULES = [*ROOT.glob("*.py"), *(path for face in ROOT.glob("*/__init__.py") for path in face.parent.glob("*.py"))]
NOT_ON_THE_PAGE = ("cli", "hub", "huggingface", "modelscope", "remote", "space_cache", "command", "download", "install")
BEHIND = [
    path
    for path in MODULES
    if path.parent.name != "train_mini" and not path.stem.startswith((*NOT_ON_THE_PAGE, "app", "server"))
]
OF_OPERATORS = {"allowed_hosts", "device", "memory", "places", "links", "verify"}
STARTUP = ("Z_IMAGE_MODELS", "memory", "device", "weights", "mode", "model")  # fields that the page does not have
ERRORS = {name for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, errors.StudioError)}

HOLE = "7"  # what stands for a value
NAMES = {"ControlNet", "LoRA"}  # called the same everywhere


def missing(say: language.Say) -> list[tuple[str, str]]:
    """Return the sentences that a language lacks: a value stays as it is, so others come out changed."""
    return [
        (where, text)
        for where, text in said_by_code()
        if say.again(text) == text and text not in NAMES and "; allowed: " not in text and re.search("[a-z]{3}", text)
    ]


def shape(node: ast.AST) -> str | None:
    """Return a string of the source with HOLE for each value, or None where it is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(one.value) if isinstance(one, ast.Constant) else HOLE for one in node.values)
    return None


def parts(node: ast.AST, around: ast.AST) -> Iterator[str]:
    """Yield what an expression may say; a name may say whatever is given to it in the function around it."""
    if (said := shape(node)) is not None:
        yield said
    elif isinstance(node, ast.IfExp):
        yield from parts(node.body, around)
        yield from parts(node.orelse, around)
    elif isinstance(node, ast.BinOp):
        for left, right in itertools.product(parts(node.left, around), parts(node.right, around)):
            yield left + right
    elif isinstance(node, ast.Name):
        given = [one for one in ast.walk(around) if isinstance(one, ast.Assign) and _names(one, node.id)]
        more = [
            one
            for one in ast.walk(around)
            if isinstance(one, ast.AugAssign) and isinstance(one.target, ast.Name) and one.target.id == node.id
        ]
        for first in given:
            for said in parts(first.value, around):
                yield from (said + rest for one in more for rest in parts(one.value, around)) if more else [said]


def _names(assigned: ast.Assign, name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in assigned.targets)


def said_by_code() -> Iterator[tuple[str, str]]:
    """Yield each sentence that comes with a code, or that a RequestError allows, with where it stands."""
    for path in BEHIND:
        if path.stem in OF_OPERATORS:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for around in ast.walk(tree):
            if not isinstance(around, ast.FunctionDef):
                continue
            for call in ast.walk(around):
                if not isinstance(call, ast.Call):
                    continue
                named = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
                text: ast.AST | None = None
                own = path.stem == "errors" and named == "__init__"  # an error that words itself
                if named in ("Message", "refused") or (named == "Stage" and len(call.args) > 1):
                    text = call.args[1]
                elif named == "RequestError":
                    text = None if shape(call.args[0]) in STARTUP else call.args[2]
                elif (named in ERRORS or own) and call.args:
                    text = call.args[0]
                for said in parts(text, around) if text is not None else ():
                    yield f"{path.name}:{call.lineno}", said


def test_the_sentences_are_found() -> None:
    said = {text for _, text in said_by_code()}
    assert "7 requests are waiting already; try again in a moment" in said
    assert "The picture has 7 frames or pages; the first one is used." in said
    assert "The memory did not suffice at first; drawn with a tighter plan: 7." in said
    assert len(said) > 70


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_sentence_with_a_code_is_missing(path: Path) -> None:
    assert missing(language.say_in(json.loads(path.read_text(encoding="utf-8"))["tags"][0])) == []


def test_a_sentence_that_is_missing_is_seen() -> None:
    texts = dict(language.say_in("zh").texts)
    del texts["{limit} requests are waiting already; try again in a moment"]
    assert [text for _, text in missing(language.Say(texts))] == [
        f"{HOLE} requests are waiting already; try again in a moment"
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_fields_take_and_choices_are_called_is_there(path: Path) -> None:
    texts = json.loads(path.read_text(encoding="utf-8"))["texts"]
    say = language.Say(texts)
    modes: list[type[Request]] = [*MODES.values(), Preprocess]
    for mode in modes:
        for name, field in mode.model_fields.items():
            if name in ("weights",):
                continue  # the page offers no choice
            assert field.description in texts, name
            said = mode.allowed(name)
            assert say.again(said) != said or "," in said or name in ("model", "preprocessor"), (name, said)
    titles = [*(one.title for one in PREPROCESSORS.values()), *(one.title for one in UPSCALERS.values())]
    for title in titles:
        assert title in texts
    assert all(facts.help in texts for facts in PREPROCESSORS.values())


def sentences_of_the_program() -> set[str]:
    """Every string in the program's modules, values as HOLE, and those that are put together when it runs."""
    found = set()
    for path in BEHIND:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found |= {said for node in ast.walk(tree) if (said := shape(node)) is not None}
    modes: list[type[Request]] = [*MODES.values(), Preprocess]
    for mode in modes:
        found |= {re.sub(r"\d+(\.\d+)?", HOLE, mode.allowed(name)) for name in mode.model_fields}
        found |= {field.description or "" for field in mode.model_fields.values()}
    return found | {
        *(str(sizes) for sizes in IMAGE_SIZES.values()),
        *(f"LoRA for {facts.title}" for facts in MODELS.values()),
        f"Width and height: {IMAGE_SIZES['mini']}.",
        f"Refined from {HOLE} of the schedule; steps: {HOLE}.",
        f"the {inventory.MINIATURE} has no {HOLE}",
        f"a .safetensors file of up to {HOLE} GiB",
        idle("Describe a picture", "Generate"),
        idle("Choose an image, describe a picture", "Generate"),
        idle("Choose a picture", "Upscale"),
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_locale_translates_what_the_program_says(path: Path) -> None:
    """What is long is compared by its beginning: some sentences are put together of several strings."""
    said = sentences_of_the_program()
    whole = "\n".join(said)
    strays = []
    for text in json.loads(path.read_text(encoding="utf-8"))["texts"]:
        flat = "".join(
            words + (HOLE if name is not None else "") for words, name, _, _ in string.Formatter().parse(text)
        )
        if text not in said and flat not in said and flat.split(HOLE)[0][:24] not in whole:
            strays.append(text)
    assert strays == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_translation_keeps_the_values(path: Path) -> None:
    for sentence, translated in json.loads(path.read_text(encoding="utf-8"))["texts"].items():
        assert sorted(re.findall(r"\{\w+\}", sentence)) == sorted(re.findall(r"\{\w+\}", translated)), sentence


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_examples_work_in_every_language(path: Path) -> None:
    texts = json.loads(path.read_text(encoding="utf-8"))["texts"]
    for kind, examples in EXAMPLES.items():
        assert all(example in texts for example in examples)
        assert max(map(len, examples)) <= 60  # what Gradio shows of one
        assert kind != "mini" or not any(mini.config.unknown_words(texts[example]) for example in examples)


def test_what_a_field_takes_is_worded_with_its_numbers() -> None:
    with pytest.raises(RequestError) as caught:
        TextToImage.parse(prompt="a fox", steps=0)
    said = failed(caught.value, language.say_in("zh-CN"))
    assert "步数只能是1 到 100 之间的整数；不能是 0。" in said
    assert failed(caught.value) == (
        '<p class="failed">Steps takes a whole number from 1 to 100; 0 is not possible.</p>'
    )


def test_errors_and_notes_are_worded_with_their_values() -> None:
    chinese = language.say_in("zh")
    assert "已有 32 个请求在排队" in failed(QueueFull(32), chinese)
    note = Message("first_frame", "The picture has {frames} frames or pages; the first one is used.", frames=3)
    assert noted(note, chinese) == "图片有 3 帧或页，使用第一帧。"
    assert noted(note, language.english) == str(note)


def test_a_sentence_inside_a_sentence_is_worded_too() -> None:
    chinese = language.say_in("zh")
    defect = sanity.Defect("flat", "decoding", "the VAE made one plain colour of latents that vary")
    cause = sanity.likely_cause(defect, dtype="float32", attention="torch", lora=None)
    worded = chinese.again(f"no picture came of it: {defect.seen}. {cause}")
    assert worded.startswith("没有得到图片：VAE 把有变化的潜变量变成了单一颜色。可能原因：VAE 文件已损坏")
    working = underway(Stage("safe mode", f"because {defect.seen}"), chinese, None, "")
    assert "VAE 把有变化的潜变量变成了单一颜色" in working


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_memory_plan_is_worded(path: Path) -> None:
    say = language.say_in(json.loads(path.read_text(encoding="utf-8"))["tags"][0])
    kinds: list[tuple[DeviceKind, Dtype]]
    kinds = [("cuda", "bfloat16"), ("cuda", "float32"), ("mps", "bfloat16"), ("cpu", "float32")]
    weights: list[WeightsKind] = ["full", "mini"]
    for (kind, dtype), mode, weights_kind in itertools.product(kinds, ("generate", "controlnet"), weights):
        for gigabytes, tighter, allowed in itertools.product((6, 12, 20, 40, 96), (0, 1), (None, 10**10)):
            total = gigabytes * 2**30
            plan = memory.memory_plan(
                kind, total, total, 48 * 2**30, mode, weights_kind, dtype, allowed=allowed, tighter=tighter
            )
            said = say.again(f"Memory: {'; '.join(plan.reasons)}")
            assert said.count(say("; ")) >= len(plan.reasons) - 1
            assert not re.search(r"\b[a-z]{2,}\b", said), said  # names have capitals, numbers have digits


def test_a_real_note_about_a_cut_picture_is_worded() -> None:
    from PIL import Image

    (note,) = reading.fit(Image.new("RGB", (1000, 1010)), IMAGE_SIZES["full"]).notes
    assert "裁去" in noted(note, language.say_in("zh"))


def test_what_visitors_write_is_never_translated() -> None:
    chinese = language.say_in("zh")
    text = "The miniature does not know: Steps. It knows things on a plain background, such as x; their colours, sizes, places and small numbers."  # noqa: E501
    assert "不认识：Steps。" in chinese.again(text)
    failure = Failure.of(RequestError("file", "Depth", "a PNG file"))
    assert "不能是 Depth" in failed(failure, chinese)


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
        assert language.say_in("de").again("8 steps") == "8 Schritte"
        assert language.for_gradio().translations["de"]["Cancel"] == "Abbrechen"
    finally:
        monkeypatch.undo()
        for cached in (language.locales, language.say_in):
            cached.cache_clear()


PIECES = st.lists(st.sampled_from([";", "; ", ": ", "a", ""]), min_size=2, max_size=5)


@given(PIECES, st.text("a;: .\n", max_size=14))
def test_a_text_is_taken_apart_as_an_expression_would(words: list[str], text: str) -> None:
    pieces = [(one, f"value{number}" if number < len(words) else "") for number, one in enumerate(words, 1)]
    whole = "".join(re.escape(one) + (f"(?P<{name}>.+?)" if name else "") for one, name in pieces)
    found = re.fullmatch(whole, text)
    assert language._taken_apart(text, pieces) == (found and found.groupdict())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_text_of_values_takes_long_to_take_apart(path: Path) -> None:
    """Values from outside may hold the words between them many times: an expression would try all the combinations."""
    say = language.Say(json.loads(path.read_text(encoding="utf-8"))["texts"])
    for pieces, _ in say._patterns:
        between = "".join("x" + words for words, _ in pieces[1:])
        text = pieces[0][0] + between * (language.LONGEST // len(between))
        assert isinstance(say.again(text[: language.LONGEST - 1] + "\n"), str)
        assert isinstance(say.again(text[: language.LONGEST]), str)
