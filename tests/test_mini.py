"""The embedded miniature: its files, its registration, what it knows, and how well it draws (at reduced size)."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mini
from train_mini import evaluate
from train_mini.data import Combination, caption, split
from train_mini.things import BACKGROUNDS, SIZES, THINGS

MEBIBYTE = 2**20
ATLAS = Path(__file__).parent / "data" / "mini_icons.png"  # the things at 24 px, written by train_mini's export


@pytest.fixture(scope="module")
def pipelines():
    return evaluate.Pipelines()


# ---- files -----------------------------------------------------------------------------------------------------------


def test_import_loads_no_torch():
    code = "import mini, sys; sys.exit('torch' in sys.modules or 'diffsynth' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(mini.__file__).parent).returncode == 0


def test_hashes_are_those_of_the_files():
    from diffsynth.core.loader import hash_model_file

    expected = {
        mini.TURBO_FOLDER / mini.TRANSFORMER_FILE: mini.TRANSFORMER_HASH,
        mini.BASE_FOLDER / mini.TRANSFORMER_FILE: mini.TRANSFORMER_HASH,
        mini.TURBO_FOLDER / mini.TEXT_ENCODER_FILE: mini.TEXT_ENCODER_HASH,
        mini.TURBO_FOLDER / mini.VAE_FILE: mini.VAE_HASH,
    }
    assert {path: hash_model_file(str(path)) for path in expected} == expected


def test_registration_is_idempotent():
    from diffsynth.configs import MODEL_CONFIGS

    mini.register()
    count = len(MODEL_CONFIGS)
    mini.register()
    assert len(MODEL_CONFIGS) == count
    assert sum(config["model_hash"] == mini.TRANSFORMER_HASH for config in MODEL_CONFIGS) == 1


def test_weights_stay_small():
    files = [*(mini.FOLDER.parent).rglob("*.safetensors")]
    assert len(files) >= 4
    assert sum(path.stat().st_size for path in files) < 45 * MEBIBYTE


def test_stored_in_bfloat16_and_finite():
    from safetensors.torch import load_file

    for path in mini.FOLDER.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert tensor.dtype == torch.bfloat16 and torch.isfinite(tensor).all(), (path, name)


@pytest.mark.parametrize("folder", [mini.TURBO_FOLDER, mini.BASE_FOLDER], ids=["turbo", "base"])
def test_official_layout(folder):
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "ZImagePipeline"
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["shift"], scheduler["num_train_timesteps"]) == (3.0, 1000)


@pytest.mark.parametrize("folder", [mini.TURBO_FOLDER, mini.BASE_FOLDER], ids=["turbo", "base"])
def test_transformer_loads_in_diffusers(folder, pipelines):
    from diffusers import ZImageTransformer2DModel

    model, info = ZImageTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", output_loading_info=True, torch_dtype=torch.float32
    )
    assert not any(info.values()), info
    ours = pipelines.transformers["turbo" if folder == mini.TURBO_FOLDER else "base"].state_dict()
    theirs = model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_text_encoder_loads_in_transformers(pipelines):
    from transformers import Qwen3Model

    model = Qwen3Model.from_pretrained(mini.TURBO_FOLDER / "text_encoder", dtype=torch.float32)
    tokens = pipelines.pipe.tokenizer(["a fox on a blue background"], return_tensors="pt")
    with torch.no_grad():
        theirs = model(**tokens, output_hidden_states=True).hidden_states[-2]
        ours = pipelines.pipe.text_encoder(**tokens, output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_tokenizer_carries_the_chat_template(pipelines):
    tokenizer = pipelines.pipe.tokenizer
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a fox"}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    assert chat == "<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.convert_ids_to_tokens(tokenizer(chat).input_ids)[-5:-3] == ["<|im_end|>", "Ċ"]
    assert tokenizer.decode(tokenizer("käse 狐狸").input_ids) == "käse 狐狸"
    assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.padding_side == "right"


# ---- knowledge -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red apple on a blue background", []),
        ("A Small FOX, Grey background.", []),
        ("a fire engine on red", []),
        ("an engine on fire", ["engine"]),
        ("a fox riding a velociraptor, riding", ["riding", "velociraptor"]),
        ("", []),
    ],
)
def test_unknown_words(prompt, expected):
    assert mini.unknown_words(prompt) == expected


def test_every_known_thing_is_known():
    things = mini.known_things()
    assert len(things) == len(THINGS) >= 150
    assert [t for t in things if mini.unknown_words(f"a small {t} on a pink background")] == []


# ---- quality ---------------------------------------------------------------------------------------------------------


def gallery(background: str) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Return every thing in both sizes on a background as [N, 32 * 32 * 3], and its names."""
    atlas, pictures, names = Image.open(ATLAS), [], []
    for i, thing in enumerate(THINGS):
        icon = atlas.crop((24 * (i % 16), 24 * (i // 16), 24 * (i % 16) + 24, 24 * (i // 16) + 24))
        for size, side in SIZES.items():
            small = icon.resize((side // 4, side // 4), Image.Resampling.BOX if side < 96 else Image.Resampling.NEAREST)
            picture = Image.new("RGB", (32, 32), BACKGROUNDS[background])
            picture.paste(small, ((32 - small.width) // 2,) * 2, small)
            pictures.append(np.asarray(picture, dtype=np.float32).ravel())
            names.append((thing, size))
    return np.stack(pictures), names


@pytest.mark.parametrize(("mode", "count", "allowed"), [("turbo", 32, 2), ("base", 8, 1)])
def test_draws_what_the_prompt_says(pipelines, mode, count, allowed):
    """Reduced evaluation on held-out combinations: thing, size and background of nearly every picture are right."""
    galleries, wrong = {}, []
    for seed, c in enumerate(split()[1][-count:], 1):
        picture = pipelines.paint(mode, caption(c, "{a} on a {b} background"), seed)
        if c.background not in galleries:
            galleries[c.background] = gallery(c.background)
        pictures, names = galleries[c.background]
        nearest = names[np.square(pictures - evaluate.shrink(picture)).sum(1).argmin()]
        if nearest != (c.thing, c.size) or evaluate.background_of(picture) != c.background:
            wrong.append((c, nearest, evaluate.background_of(picture)))
    assert len(wrong) <= allowed, wrong


def test_turbo_and_base_differ_and_guidance_matters(pipelines):
    prompt, seed = "a fox on a blue background", 3
    turbo = pipelines.paint("turbo", prompt, seed).astype(int)
    base = pipelines.paint("base", prompt, seed).astype(int)
    unguided = pipelines.paint("base", prompt, seed, cfg=1.0).astype(int)
    assert np.abs(turbo - base).mean() > 0.2
    assert np.abs(base - unguided).mean() > 0.2


def test_guidance_makes_things_more_themselves(pipelines):
    """The prompted thing stands out more from every other one, summed over pictures."""
    margins = {1.0: 0.0, 4.0: 0.0}
    for seed, c in enumerate(split()[1][:6], 1000):
        pictures, names = gallery(c.background)
        right = np.array([thing == c.thing for thing, _ in names])
        for cfg in margins:
            picture = evaluate.shrink(pipelines.paint("base", caption(c, "{a} on a {b} background"), seed, cfg=cfg))
            distances = np.sqrt(np.square(pictures - picture).mean(1))
            margins[cfg] += distances[~right].min() - distances[right].min()
    assert margins[4.0] > margins[1.0]


def test_negative_prompt_steers_away(pipelines):
    moved, prompts = 0, ["a fox", "a hamburger", "an owl", "a bicycle"]
    for seed, prompt in enumerate(prompts):
        plain = evaluate.background_of(pipelines.paint("base", prompt, seed))
        steered = evaluate.background_of(pipelines.paint("base", prompt, seed, negative=f"{plain} background"))
        moved += plain != steered
    assert moved >= len(prompts) - 1


def test_same_seed_same_picture(pipelines):
    pictures = [pipelines.paint("turbo", "a fox", seed) for seed in (1, 1, 2)]
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any()


def test_measures_recognise_a_wrong_picture():
    flat = np.full((128, 128, 3), BACKGROUNDS["blue"], np.uint8)
    assert evaluate.background_of(flat) == "blue" and evaluate.extent(flat) == 0
    boxed = flat.copy()
    boxed[32:96, 32:96] = 255
    assert evaluate.extent(boxed) == 64
    pictures, names = gallery("blue")
    nearest = names[np.square(pictures - pictures[5]).sum(1).argmin()]
    assert nearest == names[5] and Combination(nearest[0], "blue", nearest[1])
