"""A LoRA through the engine and the command line, on the real miniature: what it does, what is shown, what stays."""

import hashlib
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import cli
import lora.file
from core.errors import RequestError
from core.events import Failure, Result, Stage, Step
from core.foreign import parse_a1111
from core.messages import Message
from core.metadata import save
from core.request import ControlNet, DrawRequest, TextToImage, Upscale
from engine import Engine, Settings
from hub import checkpoint, parts
from tests.helpers import loras
from tests.helpers.loras import random_pairs, write
from tests.helpers.workers import pipeline_of, worker_of

PAIRS = random_pairs()
ALPHA = "lora_unet_layers_0_attention_to_q.alpha"


@pytest.fixture
def style(tmp_path: Path) -> Path:
    return write(tmp_path / "my, style.safetensors", loras.kohya(PAIRS))


def ask(**values: object) -> TextToImage:
    return TextToImage.parse(**{"prompt": "a fox on a black background", "seed": 7, "steps": 2, **values})


def pixels(png: bytes) -> bytes:
    return Image.open(io.BytesIO(png)).tobytes()


# --- the engine ---


def test_a_lora_changes_the_image_and_nothing_afterwards(
    engine: Engine, draw: Callable[..., Result], style: Path
) -> None:
    before = draw(steps=2).png
    applied = draw(steps=2, lora=str(style), lora_strength=1).png
    assert pixels(applied) != pixels(before)
    kept = pipeline_of(engine).lora_copies
    assert len(kept) == len(PAIRS)
    assert draw(steps=2).png == before
    assert len(kept) == 0  # a picture without one has the memory that its plan counts with
    assert draw(steps=2, lora=str(style), lora_strength=1).png == applied
    assert pixels(draw(steps=2, lora=str(style), lora_strength=0.5).png) not in (pixels(before), pixels(applied))


@pytest.mark.parametrize("strength", [-5, -1, 5])
def test_a_strength_of_either_sign_draws_what_a_scaled_lora_does(
    draw: Callable[..., Result], strength: int, tmp_path: Path
) -> None:
    faint = {name: (down / 20, up) for name, (down, up) in PAIRS.items()}
    scaled = {name: (down, strength * up) for name, (down, up) in faint.items()}
    asked = draw(steps=2, lora=str(write(tmp_path / "a.safetensors", loras.peft(faint))), lora_strength=strength)
    once = draw(steps=2, lora=str(write(tmp_path / "b.safetensors", loras.peft(scaled))), lora_strength=1)
    difference = [abs(one - other) for one, other in zip(pixels(asked.png), pixels(once.png), strict=True)]
    assert max(difference) <= 1  # of rounding
    assert pixels(asked.png) != pixels(draw(steps=2).png)


def test_strength_zero_draws_what_no_lora_draws(draw: Callable[..., Result], style: Path) -> None:
    assert pixels(draw(steps=2, lora=str(style), lora_strength=0).png) == pixels(draw(steps=2).png)


def test_a_strength_without_a_lora_means_nothing(draw: Callable[..., Result]) -> None:
    assert draw(steps=2, lora_strength=1.5).png == draw(steps=2).png


def test_image_carries_name_hash_strength_and_digest(draw: Callable[..., Result], style: Path, tmp_path: Path) -> None:
    result = draw(steps=2, lora=str(style), lora_strength=0.75)
    path = tmp_path / "picture.png"
    save(result, path)
    file = lora.file.read(style)
    data = style.read_bytes()[file.header.data_start :]
    short = hashlib.sha256(data).hexdigest()[:12]
    with Image.open(path) as image:
        text, chunk = image.info["parameters"], json.loads(image.info["z-image-studio"])
    assert f'Lora hashes: "my_ style: {short}", Lora strength: 0.75, ' in text
    assert chunk["lora"] == {"name": "my, style", "hash": short, "strength": 0.75}
    assert chunk["inputs"] == {"lora": hashlib.sha256(style.read_bytes()).hexdigest()}
    assert chunk["request"]["lora"] == style.name
    assert str(tmp_path) not in text + json.dumps(chunk)
    found = parse_a1111(text)
    assert found.not_restored == {"Lora hashes": f"my_ style: {short}", "Lora strength": "0.75"}
    assert result.sidecar["lora"] == chunk["lora"]
    assert "lora" not in json.loads(Image.open(io.BytesIO(draw(steps=2).png)).info["z-image-studio"])


def test_file_is_judged_before_anything_is_loaded(tmp_path: Path) -> None:
    engine = Engine(Settings(weights="mini", device="cpu"))
    bad = write(tmp_path / "flux.safetensors", {"double_blocks.0.img_attn.proj.lora_A.weight": torch.ones(4, 4)})
    (failure,) = engine.run(ask(lora=str(bad)))
    assert isinstance(failure, Failure)
    assert (failure.code, failure.exit_code, failure.values["field"]) == ("bad_request", 2, "lora")
    assert failure.text.endswith("this looks like one for FLUX")
    assert worker_of(engine).pipeline is None


def test_unusable_files_are_failures_and_the_next_request_works(
    engine: Engine, draw: Callable[..., Result], tmp_path: Path
) -> None:
    before = draw(steps=2).png
    full = random_pairs(size="full", modules=["layers.20.attention.to_q"])
    broken = {name: tensor * float("nan") for name, tensor in loras.peft(PAIRS).items()}
    for path, reason in {
        tmp_path / "absent.safetensors": "that exists",
        write(tmp_path / "real.safetensors", loras.peft(full)): "this one was made for Z-Image",
        write(tmp_path / "broken.safetensors", broken): "holds NaN or infinity",
    }.items():
        *_, failure = engine.run(ask(lora=str(path)))
        assert isinstance(failure, Failure)
        assert reason in failure.text
        assert draw(steps=2).png == before


def with_header(path: Path, entry: str) -> Path:
    """A whole LoRA with one more entry in its header, as it is written here."""
    data = write(path, loras.peft(PAIRS)).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    text = data[8:end].rstrip()[:-1] + b", " + entry.encode() + b"}"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    return path


NO_NUMBERS = ["1e308", "1e999", "NaN", "-Infinity", "1" + "0" * 400, "9" * 5_000]


def test_no_file_whatever_its_numbers_takes_away_what_is_loaded(
    engine: Engine, draw: Callable[..., Result], tmp_path: Path
) -> None:
    def told(**metadata: str) -> Path:
        return write(tmp_path / f"{next(number)}.safetensors", loras.peft(PAIRS), metadata)

    def entry(text: str) -> Path:
        return with_header(tmp_path / f"{next(number)}.safetensors", f'"odd": {text}')

    number = itertools.count()
    before = draw(steps=2).png
    loaded = pipeline_of(engine)
    bad = [
        *(told(lora_adapter_metadata=f'{{"lora_alpha": {value}}}') for value in NO_NUMBERS),
        *(told(lora_adapter_metadata=f'{{"alpha_pattern": {{"to_q": {value}}}}}') for value in NO_NUMBERS),
        *(entry(f'{{"dtype": "F32", "shape": [0, {value}], "data_offsets": [0, 0]}}') for value in NO_NUMBERS),
        *(entry(f'{{"dtype": "F32", "shape": [0], "data_offsets": [0, {value}]}}') for value in NO_NUMBERS),
        *(entry("[" * depth) for depth in (900, 10_000)),
        entry(f'{{"dtype": "F32", "shape": [{"0," * 100_000}0], "data_offsets": [0, 0]}}'),
        write(tmp_path / "f64.safetensors", loras.kohya(PAIRS) | {ALPHA: torch.tensor(1e308, dtype=torch.float64)}),
        write(tmp_path / "f32.safetensors", loras.kohya(PAIRS) | {ALPHA: torch.tensor(3e38)}),
    ]
    for path in bad:
        (*events, failure) = engine.run(ask(lora=str(path)))
        assert isinstance(failure, Failure)
        assert (failure.code, failure.values["field"]) == ("bad_request", "lora"), failure.text
        assert not events
        assert len(failure.text) < 400
        assert pipeline_of(engine) is loaded
    # What only adorns is left out, and the LoRA is as good as ever.
    drawn = draw(steps=2, lora=str(told())).png
    adorning = ("ss_num_train_images", "trigger_words", "ss_tag_frequency", "modelspec.title", "sshs_model_hash")
    for value in ("²", "[" * 10_000, "[" * 900 + "1" + "]" * 900, f"[{'9' * 5_000}]"):
        for keys in (adorning, adorning[:1]):
            path = told(**{"ss_tag_frequency": '{"x": {"neon": 2}}', **dict.fromkeys(keys, value)})
            lora.file.identify(lora.file.read(path))
        *events, result = engine.run(ask(lora=str(path)))
        assert isinstance(result, Result), result
        assert pixels(result.png) == pixels(drawn)
        assert Stage("starting") not in events
    assert pipeline_of(engine) is loaded
    *events, result = engine.run(ask())
    assert not any(isinstance(event, Stage) and event.name == "loading" for event in events)
    assert isinstance(result, Result)
    assert result.png == before


def test_cancelled_run_leaves_nothing_of_the_lora(engine: Engine, draw: Callable[..., Result], style: Path) -> None:
    before = draw(steps=2).png
    run = engine.run(ask(lora=str(style), lora_strength=1.5))
    while (event := next(run)) != Step(1, 2):
        assert not isinstance(event, Failure)
    run.close()
    assert draw(steps=2).png == before


def test_loading_a_lora_is_a_stage_and_the_notes_tell_what_is_left_out(engine: Engine, tmp_path: Path) -> None:
    extra = {"text_encoder.x.lora_A.weight": torch.ones(2), "layers.40.attention.to_q.lora_A.weight": torch.ones(2)}
    tensors = loras.peft(PAIRS) | extra
    path = write(tmp_path / "a.safetensors", tensors, {"base_model": "Tongyi-MAI/Z-Image"})
    *events, result = engine.run(ask(lora=str(path)))
    assert Stage("loading", Message("stage", "LoRA")) in events
    assert isinstance(result, Result)
    notes = [note for note in result.notes if note.code.startswith("lora")]
    texts = [str(note) for note in notes]
    assert [note.code for note in notes] == ["lora_partly", "lora_partly", "lora_base"]
    assert "1 of 43 layers of the LoRA have no place in Z-Image and are left out: layers.40.attention.to_q." in texts[0]
    assert texts[2] == "The LoRA was trained on Z-Image; with Z-Image Turbo it may do less, or harm."


def test_a_lora_works_with_base_and_guidance_too(draw: Callable[..., Result], style: Path) -> None:
    before = draw(model="base", steps=2).png
    assert pixels(draw(model="base", steps=2, lora=str(style)).png) != pixels(before)
    assert draw(model="base", steps=2).png == before


# --- a LoRA inside a prompt ---


@pytest.mark.parametrize(
    ("fields", "tags"),
    [
        ({"prompt": "a fox <lora:gold:0.8>, on a black background"}, ("<lora:gold:0.8>",)),
        ({"prompt": "a fox <LoRA:my v2:1:0.5> <lyco:x:1> <LoRA:my v2:1:0.5>"}, ("<LoRA:my v2:1:0.5>", "<lyco:x:1>")),
        ({"prompt": "a fox", "model": "base", "negative_prompt": "<lora:bad-hands:-1>"}, ("<lora:bad-hands:-1>",)),
        ({"prompt": "a fox <lora>, <lora:>, lora:gold:1, <3 : >"}, ()),
    ],
)
def test_a_lora_named_in_a_prompt_is_told_as_not_used(
    draw: Callable[..., Result], fields: dict[str, str], tags: tuple[str, ...]
) -> None:
    result = draw(steps=1, **fields)
    notes = [str(note) for note in result.notes if note.code == "lora_tag"]
    assert len(notes) == bool(tags)
    assert all(tag in note for note in notes for tag in tags)
    assert all("under Use a LoRA (--lora FILE:STRENGTH)" in note for note in notes)
    assert set(notes) <= set(result.sidecar["notes"])


def test_other_modes_tell_it_too(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "small.png"
    Image.new("RGB", (64, 64), "red").save(path)
    asked: list[tuple[DrawRequest, str]] = [
        (Upscale.parse(image=str(path), prompt="<lora:x:1>", denoise=0, upscaler="fast"), "this mode takes none"),
        (ControlNet.parse(image=str(path), prompt="<lora:x:1>", steps=1), "under Use a LoRA"),
    ]
    for request, sentence in asked:
        (note,) = (str(note) for note in engine.draw(request).notes if note.code == "lora_tag")
        assert note.startswith("<lora:x:1> in the prompt is not used as a LoRA")
        assert sentence in note


# --- which file ---


def test_a_bare_name_is_looked_for_in_the_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    (folder / "gold.safetensors").touch()
    monkeypatch.setattr(lora.file, "FOLDERS", (tmp_path / "absent", folder))
    monkeypatch.chdir(tmp_path)
    assert lora.file.find("gold") == folder / "gold.safetensors"
    assert lora.file.find("gold.safetensors") == folder / "gold.safetensors"
    assert lora.file.find("elsewhere/gold") == Path("elsewhere/gold")
    assert lora.file.find("silver") == Path("silver")
    for odd in ("x" * 5000, "~nobody-of-that-name/x", "a\0b", "."):
        with pytest.raises(RequestError):
            lora.file.read(lora.file.find(odd))
    (tmp_path / "gold.safetensors").touch()
    assert lora.file.find("gold.safetensors") == Path("gold.safetensors")


def test_examples_belong_to_the_transformer_that_lies_beside_them() -> None:
    """A LoRA does what it was trained for on the very weights it was trained on: train it again when they change."""
    for file in (parts.MINI_ROOT / "loras").glob("*"):
        header = checkpoint.read_header(file)
        base = parts.MINI_ROOT / header.metadata["trained_on"]
        assert header.metadata["trained_on_fingerprint"] == checkpoint.fingerprint([base]), file.name
        report = lora.file.read(file).report
        assert (report.size, report.left_out) == ("mini", ())


# --- the command line ---


@pytest.mark.parametrize(
    ("given", "path", "strength"),
    [
        ("style.safetensors", "style.safetensors", None),
        ("style.safetensors:0.5", "style.safetensors", "0.5"),
        ("style.safetensors:", "style.safetensors", ""),
        ("style.SAFETENSORS:much", "style.SAFETENSORS", "much"),
        (r"C:\loras\style.safetensors", r"C:\loras\style.safetensors", None),
        (r"C:\loras\style.safetensors:1.5", r"C:\loras\style.safetensors", "1.5"),
        ("C:/a:b/style.safetensors:.5", "C:/a:b/style.safetensors", ".5"),
        (r"C:\style", r"C:\style", None),
        ("C:5", "C:5", None),
        ("gold:0.5", "gold", "0.5"),
        ("gold:-2.5", "gold", "-2.5"),
        ("style.safetensors:-5", "style.safetensors", "-5"),
        ("folder/style/:+3", "folder/style/", "+3"),
        ("gold", "gold", None),
        ("a:b.safetensors", "a:b.safetensors", None),
    ],
)
def test_strength_follows_a_colon_and_a_drive_is_none(given: str, path: str, strength: str | None) -> None:
    found = {"lora": given} | cli._lora({"lora": given})
    assert found == {"lora": path} | ({} if strength is None else {"lora_strength": strength})


@pytest.mark.slow
def test_command_line_draws_with_a_lora_and_replays_it(
    style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--weights", "mini", "--device", "cpu"]
    asked = ["generate", "a fox", "--seed", "7", "--steps", "2", *common]
    assert cli.main([*asked, "--lora", f"{style}:0.7", "--out", "one.png", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["lora"]["strength"] == 0.7
    again = ["generate", "--from", "one.png", *common, "--out"]
    assert cli.main([*again, "two.png"]) == 0  # the file lies in the current folder
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "one.png").read_bytes()

    moved = tmp_path / "elsewhere"
    moved.mkdir()
    kept = style.rename(moved / style.name)
    assert cli.main([*again, "three.png"]) == RequestError.exit_code
    assert "give it with --lora FILE" in capsys.readouterr().err
    assert cli.main([*again, "three.png", "--lora", f"{kept}:0.7"]) == 0
    assert (tmp_path / "three.png").read_bytes() == (tmp_path / "one.png").read_bytes()
    write(style, loras.peft(random_pairs(5)))  # another file of the same name
    assert cli.main([*again, "four.png"]) == RequestError.exit_code
    assert not (tmp_path / "four.png").exists()


@pytest.mark.parametrize("strength", ["5.01", "-6", "much", "", "nan"])
def test_impossible_strength_is_one_line(strength: str, style: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "a fox", "--weights", "mini", "--lora", f"{style}:{strength}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"lora_strength: {strength!r} is not possible; allowed: a number from -5 to 5"


def test_inspect_shows_what_a_lora_is(style: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(style), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["layers"] == "42 of 42 matched"
    assert (facts["rank"], facts["alpha"], facts["trained_on"]) == ("4", "4", "unknown")
    assert set(facts["matched"]) == set(PAIRS)
    assert facts["dialect"] == "LoRA, names lora_down/lora_up, prefix lora_unet_"
    assert facts["sha256"] == hashlib.sha256(style.read_bytes()).hexdigest()
    assert cli.main(["inspect", str(style)]) == 0
    assert "layers: 42 of 42 matched\nmatched: 42 modules" in capsys.readouterr().out


def test_inspect_refuses_what_is_no_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"nothing")
    assert cli.main(["inspect", str(path)]) == 2
    assert "is not a safetensors file" in capsys.readouterr().err
