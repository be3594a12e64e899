"""What other programs write into pictures, in the form in which each publishes it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import foreign
from core.errors import RequestError
from core.foreign import parse_a1111
from core.metadata import _quoted, read_picture
from core.parameters import Parameters, model_of
from core.request import SEED_MAX
from tests.helpers import pictures

LINE = "Steps: 9, Sampler: Euler, CFG scale: 1, Seed: 123, Size: 1024x768, Model: z_image_turbo_bf16"
READ = {
    "prompt": "a lighthouse",
    "model": "turbo",
    "steps": 9,
    "cfg": 1.0,
    "seed": 123,
    "width": 1024,
    "height": 768,
}


def read(tmp_path: Path, **texts: object) -> Parameters:
    """Read a PNG with these texts; what is no text is JSON."""
    written = {name: text if isinstance(text, str) else json.dumps(text) for name, text in texts.items()}
    return read_picture(pictures.png(tmp_path / "foreign.png", **written))


# --- A1111 and who writes as it does ---


def test_foreign_a1111_text_is_read_as_far_as_it_goes() -> None:
    found = parse_a1111(
        "a cat, best quality\nsecond line\nNegative prompt: dog,\nblurry\n"
        "Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: -1, Size: 512x768, Model hash: abc, Model: sd15, "
        'Lora hashes: "a: 12, b: 34", Version: v1.10'
    )
    assert found.values == {
        "prompt": "a cat, best quality\nsecond line",
        "negative_prompt": "dog,\nblurry",
        "steps": 20,
        "cfg": 7.5,
        "seed": 0,
        "width": 512,
        "height": 768,
    }
    assert found.not_restored == {
        "Sampler": "DPM++ 2M",
        "Model hash": "abc",
        "Model": "sd15",
        "Lora hashes": "a: 12, b: 34",
    }


def test_last_line_with_under_three_pairs_belongs_to_the_prompt() -> None:
    assert parse_a1111("a cat\nnote: one, other: two").values == {"prompt": "a cat\nnote: one, other: two"}


@pytest.mark.parametrize("text", ["", "Steps: x, Seed: y, Size: z", "Steps: 1e9, Seed: 1.5, CFG scale: nan?, Size: 9x"])
def test_nonsense_does_not_crash_and_is_not_lost(text: str) -> None:
    found = parse_a1111(text)
    assert found.values == {"prompt": ""}
    assert set(found.not_restored) == {pair.split(":")[0] for pair in text.split(", ") if pair}


# A1111's own expression, which ours is held against; it is slow on long lines.
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


@given(st.text('aB1_é: ,"\\/-\t\r\u3000.', max_size=40) | st.text(max_size=40).map(lambda text: text.replace("\n", "")))
def test_any_line_is_read_as_a1111_reads_it(line: str) -> None:
    assert foreign._pairs(line) == {key: foreign._unquoted(value) for key, value in PAIR.findall(line)}


KEYS = st.from_regex(r"[A-Za-z][A-Za-z0-9 /-]{1,12}", fullmatch=True)
VALUES = st.text(max_size=12) | st.integers() | st.floats()


@given(st.dictionaries(KEYS, VALUES, max_size=6), st.sampled_from([", ", ",", " , "]))
def test_any_well_formed_line_is_read_as_a1111_reads_it(pairs: dict[str, str | int | float], comma: str) -> None:
    line = comma.join(f"{key}: {_quoted(value)}" for key, value in pairs.items())
    if "\n" not in line:
        assert foreign._pairs(line) == {key: foreign._unquoted(value) for key, value in PAIR.findall(line)}


@pytest.mark.parametrize(
    "line",
    [
        *(
            "a" * 1_000_000,
            " " * 1_000_000 + "a",
            "a " * 500_000,
            "a:" * 500_000,
            "-" * 1_000_000,
            "aa" + " " * 999_999,
        ),
        *(
            'aa: "' * 250_000,
            'aa:"\\"' * 200_000,
            "aa: " + '"' * 1_000_000,
            'aa: "' + "\\" * 1_000_000,
            "aa:," * 250_000,
        ),
    ],
    ids=lambda line: line[:6],
)
def test_a_long_line_takes_no_longer_than_its_length(line: str) -> None:
    """With an expression that begins again at every character these take hours."""
    assert isinstance(foreign._pairs(line), dict)
    assert parse_a1111(line).values == {"prompt": line.strip()}  # too long for a line of pairs


@pytest.mark.parametrize(
    "value", ["²", "9" * 5_000, "1" + "0" * 400, "1e308", "1e999", "nan", "Infinity", "[" * 10_000]
)
@pytest.mark.parametrize("key", ["Steps", "CFG scale", "Seed", "Size", "Model"])
def test_an_impossible_value_is_named_or_refused(key: str, value: str) -> None:
    pairs = {"Steps": "8", "CFG scale": "1", "Seed": "3", "Size": "128x128", key: value}
    found = parse_a1111("x\n" + ", ".join(f"{name}: {text}" for name, text in pairs.items()))
    try:
        assert found.request() is not None
    except RequestError as refused:
        assert len(str(refused)) < 300
    else:
        assert key in found.not_restored or found.values["seed"] == 0


def test_half_a_character_is_no_text() -> None:
    found = parse_a1111('x\nSteps: 8, Seed: 3, Note: "\\ud83d", Whole: "\\ud83d\\ude00"')
    assert found.not_restored == {"Note": '"\\ud83d"', "Whole": "\U0001f600"}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_any_system_ends_them(end: str) -> None:
    found = parse_a1111(
        f"a lighthouse,{end}at dusk{end}Negative prompt: blurry,{end}dark{end}Steps: 9, Seed: 1, CFG scale: 4"
    )
    assert found.values["prompt"] == "a lighthouse,\nat dusk"
    assert found.values["negative_prompt"] == "blurry,\ndark"


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("Steps: 8.0, Seed: 12.0, CFG scale: 4.50, Size: 1024.0x768.0", (8, 12, 4.5, 1024, 768)),
        ("Steps: 8, Seed: 12, CFG scale: 4.5, Size: 1024 x 768", (8, 12, 4.5, 1024, 768)),
        ("Steps: 8, Seed: 12, CFG scale: 4.5, Size: 1024×768", (8, 12, 4.5, 1024, 768)),
        ("Steps: 8, Seed: 12, CFG scale: 4.5, Size: 1024X768", (8, 12, 4.5, 1024, 768)),
        ('Steps: 8, Seed: 12, CFG scale: 4.5, Size: "(1024, 768)"', (8, 12, 4.5, 1024, 768)),
    ],
)
def test_numbers_and_sizes_are_read_in_every_spelling(line: str, values: tuple[float, ...]) -> None:
    found = parse_a1111(f"a lighthouse\n{line}")
    assert tuple(found.values[name] for name in ("steps", "seed", "cfg", "width", "height")) == values
    assert all(isinstance(found.values[name], int) for name in ("steps", "seed", "width", "height"))
    assert not found.not_restored


@pytest.mark.parametrize(
    ("text", "prompt", "negative"),
    [
        ("a sign: Negative prompt: none", "a sign: Negative prompt: none", None),
        ("a sign: Negative prompt: none\nNegative prompt: rain", "a sign: Negative prompt: none", "rain"),
        # A whole text was pasted into the prompt; the program's own line is the last.
        ("a fox\nNegative prompt: old\nNegative prompt: rain", "a fox\nNegative prompt: old", "rain"),
        (f"a fox\n{LINE}\nNegative prompt: rain", f"a fox\n{LINE}", "rain"),
    ],
)
def test_what_looks_like_the_format_inside_of_a_prompt_stays_there(
    text: str, prompt: str, negative: str | None
) -> None:
    found = parse_a1111(f"{text}\nSteps: 25, Sampler: Euler, CFG scale: 4, Seed: 5, Model: z_image_bf16")
    assert (found.values["prompt"], found.values.get("negative_prompt")) == (prompt, negative)
    assert (found.values["seed"], found.values["model"]) == (5, "base")


def test_lines_behind_the_parameters_are_named() -> None:
    # sd-dynamic-prompts writes its templates there.
    found = parse_a1111(
        f"a lighthouse\n{LINE}\nTemplate: a {{lighthouse|mill}},\n by night: x\nNegative Template: a, b: c, d: e"
    )
    assert found.values == READ
    assert found.not_restored == {
        "Template": "a {lighthouse|mill},",
        "by night": "x",
        "Negative Template": "a, b: c, d: e",
    }


@pytest.mark.parametrize(
    "text",
    [
        LINE.replace(", CFG", ",\nCFG").replace(", Size", ",\nSize"),
        LINE.replace(", ", "\n"),
        LINE.replace("Steps: 9, ", "") + ", Steps: 9",
    ],
    ids=["wrapped", "a pair a line", "in another order"],
)
def test_parameters_are_read_however_they_are_laid_out(text: str) -> None:
    found = parse_a1111(f"a lighthouse\n{text}")
    assert found.values == READ
    assert not found.not_restored


@pytest.mark.parametrize(
    "text",
    [
        *("Steps: a\n" * 100_000, "Steps: a,\n" * 100_000, "Steps: 1, aa: 2, bb: 3\nx: y\n" * 30_000),
        *("Negative prompt: a\n" * 50_000, "<lora:" * 150_000, "<lora:a:" * 120_000, "\r" * 1_000_000),
        "Steps: 1, aa: 2, bb: 3" + "\nx" * 500_000,
        *("x\nSteps: 1, Seed: 2, Size: " + "1." * 40_000, "x\nSteps: 1, Seed: 2, Size: " + "(" * 90_000),
        *("[" + "1," * 500_000, "[" + " " * 1_000_000, "{" + " " * 1_000_000 + '"'),
        "x\nSteps: 1, Seed: 2, Model: " + "z-" * 40_000 + "image",
    ],
    ids=lambda text: repr(text[:24]),
)
def test_a_text_takes_no_longer_than_its_length(text: str, tmp_path: Path) -> None:
    """With a search that begins again at every line or letter these take hours."""
    try:
        assert read(tmp_path, parameters=text).source == "a1111"
    except RequestError as refused:
        assert text.startswith(("[", "{", "\r")), refused


@pytest.mark.parametrize(
    "line",
    [
        # SD.Next, modules/processing_info.py
        "Steps: 9, Size: 1024x768, Sampler: Euler, Seed: 123, CFG scale: 1, App: SD.Next, Version: 8b73cb6, "
        "Pipeline: ZImagePipeline, Operations: txt2img, Model: z_image_turbo_bf16",
        # stable-diffusion.cpp, get_image_params: a model that is a transformer alone is "Unet".
        "Steps: 9, CFG scale: 1.000000, Guidance: 3.500000, Eta: 0.000000, Seed: 123, Size: 1024x768, Model: , "
        "RNG: cuda, Sampler: euler, TE: qwen_3_4b.safetensors, Unet: z_image_turbo-Q8_0.gguf, VAE: ae.safetensors, "
        "Version: stable-diffusion.cpp",
        # Forge Neo
        "Steps: 9, Sampler: Euler, Schedule type: Simple, CFG scale: 1.0, Shift: 9, Seed: 123, Size: 1024x768, "
        "Model hash: 9deee6, Model: z_image_turbo_bf16, Module 1: ae, Module 2: qwen_3_4b, Version: neo",
    ],
    ids=["sd.next", "sd.cpp", "forge"],
)
def test_who_writes_as_a1111_does_is_read(line: str) -> None:
    found = parse_a1111(f"a lighthouse\n{line}")
    assert found.values == READ
    assert not {"Sampler", "Model", "Unet", "Size", "Seed"} & found.not_restored.keys()


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (f"Seed: {SEED_MAX + 1}", {"Seed": "4294967296"}),
        ("Seed: 1102676403634909", {"Seed": "1102676403634909"}),
        ("Seed: 18446744073709551615", {"Seed": "18446744073709551615"}),
        ("Seed: -1", {}),
        (f"Seed: {SEED_MAX}", {}),
        ("Sampler: DPM++ 2M, Schedule type: Karras", {"Sampler": "DPM++ 2M", "Schedule type": "Karras"}),
        ("Hires upscale: 2, Hires steps: 4", {"Hires upscale": "2", "Hires steps": "4"}),
        ('Lora hashes: "a: 12, b: 34"', {"Lora hashes": "a: 12, b: 34"}),
        ("Model: zImageTurbo_moody_v2", {"Model": "zImageTurbo_moody_v2"}),
    ],
)
def test_what_cannot_be_restored_is_named(line: str, named: dict[str, str]) -> None:
    found = parse_a1111(f"a lighthouse\nSteps: 9, CFG scale: 1, {line}")
    assert found.not_restored == named
    assert ("seed" in found.values) == (line in ("Seed: -1", f"Seed: {SEED_MAX}"))


def test_a_lora_in_the_prompt_is_named() -> None:
    found = parse_a1111(f"a lighthouse <lora:ink wash:0.8> <lora:gold>\n{LINE}")
    assert found.not_restored == {"LoRA": "ink wash (0.8), gold"}


@pytest.mark.parametrize(
    ("name", "model", "all_said"),
    [
        ("z_image_turbo_bf16", "turbo", True),
        ("z_image_turbo_fp8_e4m3fn_scaled.safetensors", "turbo", True),
        ("Tongyi-MAI/Z-Image-Turbo", "turbo", True),
        ("unet\\z-image-turbo-Q4_K_M.gguf", "turbo", True),
        ("svdq-int4_r128-z-image-turbo", "turbo", True),
        ("Z-Image Turbo", "turbo", True),
        ("ZImageTurbo", "turbo", True),
        ("Z-Image", "base", True),
        ("z_image_base_bf16.safetensors", "base", True),
        ("moodyZImageTurbo_v3", "turbo", False),
        ("z-image-de-turbo", "base", False),
        ("Z-Image/sdxl_turbo.safetensors", None, False),
        ("sd_xl_turbo_1.0", None, False),
    ],
)
def test_a_models_file_is_known_by_its_name(name: str, model: str | None, all_said: bool) -> None:
    assert model_of(name) == (model, all_said)


@pytest.mark.parametrize(("cfg", "named"), [("1", None), ("0", None), ("0.0", None), ("5", "5")])
def test_turbo_is_turbo_whatever_stands_beside_it(cfg: str, named: str | None) -> None:
    found = parse_a1111(f"a fox\nNegative prompt: rain\nSteps: 9, CFG scale: {cfg}, Seed: 1, Model: z_image_turbo_bf16")
    assert found.filled["model"] == "turbo"
    assert found.not_restored == {"Negative prompt": "rain"} | ({"CFG scale": named} if named else {})
    assert found.request().model_dump()["cfg"] in (None, 1)


@pytest.mark.parametrize(
    ("line", "model"), [("CFG scale: 7", "base"), ("CFG scale: 0", "turbo"), ("CFG scale: 1", "turbo")]
)
def test_a_model_of_others_becomes_the_one_that_can_do_what_was_asked(line: str, model: str) -> None:
    found = parse_a1111(f"a fox\nSteps: 9, {line}, Seed: 1, Model: sdxl")
    assert "model" not in found.values
    assert found.filled["model"] == model
    assert found.not_restored["Model"] == "sdxl"


# --- JSON ---

# SwarmUI, T2IParamInput.GenRawMetadata
SWARM: dict[str, Any] = {
    "sui_image_params": {
        "prompt": "a lighthouse",
        "negativeprompt": "",
        "model": "z_image_turbo_fp8",
        "images": 1,
        "seed": 123,
        "steps": 9,
        "cfgscale": 1.0,
        "aspectratio": "4:3",
        "width": 1024,
        "height": 768,
        "sampler": "euler",
        "scheduler": "simple",
        "loras": ["style/ink", "gold"],
        "loraweights": ["0.8", "1"],
        "swarm_version": "0.9.7.0",
    },
    "sui_extra_data": {"date": "2026-01-01", "generation_time": "4.8 sec"},
    "sui_models": [{"name": "z_image_turbo_fp8.safetensors", "param": "model", "hash": "0x12"}],
}
# InvokeAI, invokeai/app/invocations/metadata.py (CoreMetadataInvocation)
INVOKE = {
    "generation_mode": "z_image_txt2img",
    "positive_prompt": "a lighthouse",
    "negative_prompt": None,
    "width": 1024,
    "height": 768,
    "seed": 123,
    "rand_device": "cpu",
    "cfg_scale": 1.0,
    "steps": 9,
    "scheduler": "euler",
    "model": {"key": "1f", "hash": "blake3:12", "name": "Z-Image Turbo", "base": "z-image", "type": "main"},
    "loras": [{"model": {"name": "ink", "base": "z-image", "type": "lora"}, "weight": 0.8}],
    "app_version": "6.10.0",
}
# InvokeAI before 3, backend/image_util/pngwriter: `sd-metadata`
INVOKE_2 = {
    "model": "stable diffusion",
    "model_weights": "stable-diffusion-1.5",
    "app_id": "invoke-ai/InvokeAI",
    "image": {
        "prompt": [{"prompt": "a lighthouse", "weight": 1.0}],
        "steps": 9,
        "cfg_scale": 7.5,
        "height": 768,
        "width": 1024,
        "seed": 123,
        "type": "txt2img",
        "sampler": "k_lms",
    },
}
# Fooocus, modules/meta_parser.py (FooocusMetadataParser)
FOOOCUS = {
    "adm_guidance": "(1.5, 0.8, 0.3)",
    "base_model": "juggernautXL_v8",
    "base_model_hash": "aeb7e9e689",
    "full_prompt": ["cinematic still a lighthouse . moody"],
    "guidance_scale": 4,
    "lora_combined_1": "offset_lora : 0.1",
    "loras": [["offset_lora", 0.1, "4852686128"]],
    "metadata_scheme": "fooocus",
    "negative_prompt": "blurry",
    "prompt": "a lighthouse",
    "refiner_model": "None",
    "resolution": "(1024, 768)",
    "sampler": "dpmpp_2m_sde_gpu",
    "seed": "123",
    "steps": 9,
    "styles": "['Fooocus V2']",
    "version": "Fooocus v2.5.5",
}
# NovelAI, as A1111's images.read_info_from_image reads it
NOVELAI = {
    "Title": "NovelAI generated image",
    "Description": "a lighthouse",
    "Software": "NovelAI",
    "Source": "NovelAI Diffusion V4.5 4BDE2A90",
    "Comment": json.dumps(
        {
            "prompt": "a lighthouse",
            "steps": 9,
            "height": 768,
            "width": 1024,
            "scale": 5.0,
            "cfg_rescale": 0.0,
            "seed": 123,
            "n_samples": 1,
            "sampler": "k_euler_ancestral",
            "uc": "blurry",
            "v4_prompt": {"caption": {"base_caption": "a lighthouse", "char_captions": []}},
        }
    ),
}
OTHER = {"prompt": "a lighthouse", "steps": 9, "seed": 123, "width": 1024, "height": 768}
READ_OTHER = {name: value for name, value in READ.items() if name not in ("model", "cfg")}


@pytest.mark.parametrize(
    ("texts", "source", "values", "named"),
    [
        ({"parameters": SWARM}, "swarmui", READ, {"LoRA": "style/ink (0.8), gold (1)", "scheduler": "simple"}),
        ({"invokeai_metadata": INVOKE}, "invokeai", READ, {"LoRA": "ink (0.8)", "rand_device": "cpu"}),
        (
            {"sd_metadata": INVOKE_2},
            "invokeai",
            READ_OTHER | {"cfg": 7.5},
            {"Sampler": "k_lms", "Model": "stable-diffusion-1.5"},
        ),
        (
            {"parameters": FOOOCUS, "fooocus_scheme": "fooocus"},
            "fooocus",
            READ_OTHER | {"cfg": 4.0, "negative_prompt": "blurry"},
            {
                "Sampler": "dpmpp_2m_sde_gpu",
                "Model": "juggernautXL_v8",
                "LoRA": "offset_lora (0.1)",
                "styles": "['Fooocus V2']",
            },
        ),
        (
            NOVELAI,
            "novelai",
            READ_OTHER | {"cfg": 5.0, "negative_prompt": "blurry"},
            {"Sampler": "k_euler_ancestral", "Model": "NovelAI Diffusion V4.5 4BDE2A90"},
        ),
        ({"parameters": OTHER}, "json", READ_OTHER, {}),
    ],
    ids=["swarmui", "invokeai", "invokeai 2", "fooocus", "novelai", "other"],
)
def test_json_of_each_program_is_read(
    texts: dict[str, Any], source: str, values: dict[str, object], named: dict[str, str], tmp_path: Path
) -> None:
    found = read(tmp_path, **texts)
    assert found.source == source
    assert found.values == values
    assert named.items() <= found.not_restored.items()


@pytest.mark.parametrize("ending", ["jpg", "webp"])
@pytest.mark.parametrize(("written", "source"), [(SWARM, "swarmui"), (FOOOCUS, "fooocus"), (NOVELAI, "novelai")])
def test_json_in_a_comment_is_read(written: object, source: str, ending: str, tmp_path: Path) -> None:
    comment = b"UNICODE\0" + json.dumps(written).encode("utf-16-le")
    found = read_picture(pictures.with_exif(tmp_path / f"x.{ending}", pictures.exif(comment)))
    assert (found.source, found.values["prompt"], found.values["seed"]) == (source, "a lighthouse", 123)


@pytest.mark.parametrize("key", ["parameters", "prompt", "workflow", "Comment", "invokeai_metadata"])
@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "[1, 2]",
        '{"a": 1}',
        '[{"prompt": "x"}]',
        '{"prompt": "a fox", "steps": 8, "seed"',  # cut off
        '{"note": "a, Steps: 8, Seed: 3, Size: 8x8"}',
        '{"note": "a, Steps: 8, Seed: 3, Size: 8x8"',
        '{\n  "prompt": "a fox",\n  "note": "a, Steps: 8, Seed: 3, Size: 8x8"',
        '{"prompt": ' + "[" * 5_000,
        '{"1": {"class_type": "LoadImage", "inputs": {"image": "x.png"}}}',
    ],
)
def test_json_never_becomes_a_prompt(key: str, text: str, tmp_path: Path) -> None:
    try:
        found = read(tmp_path, **{key: text})
    except RequestError as refused:
        assert "with its parameters inside, from Z-Image Studio or one of A1111, Forge" in str(refused)
    else:
        assert key == "invokeai_metadata"
        assert not found.values.get("prompt")


@pytest.mark.parametrize("prompt", ["{red|blue} fox", "[cat:dog:0.5]", '{"subject": "a fox"}'])
def test_a_prompt_that_begins_like_json_is_one_where_parameters_follow(prompt: str, tmp_path: Path) -> None:
    found = read(tmp_path, parameters=f"{prompt}\n{LINE}")
    assert found.values == READ | {"prompt": prompt}


@pytest.mark.parametrize(
    "value", [None, True, [], {}, "x", [1], float("nan"), float("inf"), "9" * 5_000, 10**19, -(10**19)]
)
@pytest.mark.parametrize("field", sorted(SWARM["sui_image_params"]))
def test_any_value_in_any_field_is_named_or_refused(field: str, value: object, tmp_path: Path) -> None:
    params = {**SWARM["sui_image_params"], field: value}
    found = read(tmp_path, parameters={"sui_image_params": params})
    json.dumps(dict(found.values), allow_nan=False)
    try:
        found.request()
    except RequestError as refused:
        assert len(str(refused)) < 300
