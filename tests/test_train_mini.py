"""The miniature's training code: split, captions, the batched forward, the optimiser."""

import random

import pytest
import torch

from mini import TEXT_ENCODER_CONFIG
from train_mini import muon, transformer
from train_mini.data import Combination, all_combinations, article, caption, random_caption, split
from train_mini.things import BACKGROUNDS, NO_ARTICLE, SIZES, THINGS


def test_split_holds_out_a_tenth_of_whole_combinations():
    training, held_out = split()
    assert not set(training) & set(held_out)
    assert sorted(training + held_out, key=str) == sorted(all_combinations(), key=str)
    assert len(held_out) == round(0.1 * len(all_combinations()))
    assert split() == (training, held_out)


def test_the_world_is_as_large_as_promised():
    names = [name for group in THINGS.values() for name in group]
    assert len(THINGS) >= 150 and len(BACKGROUNDS) == 8 and len(SIZES) == 2
    assert len(names) == len(set(names))
    assert set(names) >= NO_ARTICLE


def test_icons_and_pictures_lie_on_the_patch_grid():
    from train_mini.data import PICTURE_SIDE

    assert all((PICTURE_SIDE - side) // 2 % 16 == 0 for side in SIZES.values())


@pytest.mark.parametrize(
    ("words", "noun", "expected"),
    [
        ("fox", "fox", "a fox"),
        ("owl", "owl", "an owl"),
        ("unicorn", "unicorn", "a unicorn"),
        ("umbrella", "umbrella", "an umbrella"),
        ("small grapes", "grapes", "small grapes"),
        ("large owl", "owl", "a large owl"),
    ],
)
def test_article(words, noun, expected):
    assert article(words, noun) == expected


def test_caption_fills_the_template():
    c = Combination("fox", "blue", "small")
    assert caption(c, "{a} on a {b} background") == "a small fox on a blue background"
    assert caption(c, "{b} background, {x}", size=False) == "blue background, fox"


def test_random_captions_say_what_they_claim():
    rng = random.Random(0)
    c = Combination("fire-engine", "gray", "small")
    made = [random_caption(c, rng) for _ in range(3000)]
    for m in made:
        text = m.text.lower()
        assert ("fire engine" in text or "fire truck" in text) == (m.thing is not None)
        assert ("gray" in text or "grey" in text) == (m.background is not None)
        assert any(f"{w} fire" in text for w in ("small", "little", "tiny")) == (m.size is not None)
    assert 0.08 < sum(not m.text for m in made) / len(made) < 0.12
    assert 0.30 < sum(m.size is None for m in made) / len(made) < 0.45


@pytest.mark.parametrize("words", [19, 32, 45])
@pytest.mark.parametrize("timestep", [1000.0, 437.0])
def test_batched_forward_equals_diffsynths(words, timestep):
    from diffsynth.pipelines.z_image import model_fn_z_image_turbo

    from pipeline import follow_weight_dtype

    model = transformer.build()
    follow_weight_dtype(model.t_embedder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():  # away from the start, where modulation is zero
            p += 0.05 * torch.randn(p.shape, generator=generator)
        captions = [torch.randn(words - i, TEXT_ENCODER_CONFIG["hidden_size"], generator=generator) for i in range(3)]
        latents = torch.randn(3, 16, 16, 16, generator=generator)
        single = torch.cat(
            [
                model_fn_z_image_turbo(dit=model, latents=x[None], timestep=torch.tensor([timestep]), prompt_embeds=[e])
                for x, e in zip(latents, captions, strict=True)
            ]
        )
        stacked, lengths = transformer.stack_words(captions)
        rope = transformer.rope_table(model, stacked.shape[1], 8, 8, "cpu")
        batched = transformer.forward(model, latents, torch.full((3,), timestep / 1000), stacked, lengths, rope)
        other = transformer.forward(
            model, latents, torch.full((3,), timestep / 1000), stacked.roll(1, 0), lengths, rope
        )
    assert (batched - single).abs().max() < 1e-5
    assert (batched - other).abs().max() > 1e-3  # the caption does reach the output


def test_start_values_leave_no_uninitialised_memory():
    a, b = transformer.build().state_dict(), transformer.build().state_dict()
    assert all(torch.isfinite(v).all() and torch.equal(v, b[k]) for k, v in a.items())


def test_muon_steps_are_nearly_orthogonal():
    g = torch.randn(3, 48, 96, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(muon.orthogonalise(g, 5, torch.float32))
    assert values.min() > 0.4 and values.max() < 1.4


def test_sigma_draws():
    generator = torch.Generator().manual_seed(0)
    high = transformer.draw_sigma(64, True, generator)
    every = transformer.draw_sigma(6400, False, generator)
    assert high.min() >= 0.88 and high.max() <= 1.0
    assert every.min() < 0.15 and every.max() > 0.99
    assert 0.5 < every.median() < 0.75


# --- the example LoRA ---


def test_gilding_turns_things_to_gold_and_leaves_the_background():
    from PIL import Image, ImageDraw

    from train_mini.lora import gilded

    picture = Image.new("RGB", (128, 128), (40, 90, 200))
    ImageDraw.Draw(picture).ellipse((32, 32, 96, 96), fill=(250, 250, 255))
    ImageDraw.Draw(picture).ellipse((48, 48, 80, 80), fill=(20, 160, 60))
    golden = gilded(picture)
    assert golden.getpixel((4, 4)) == (40, 90, 200)
    for place in ((36, 64), (64, 64)):
        red, green, blue = golden.getpixel(place)
        assert red > green > blue
    assert golden.getpixel((36, 64)) > golden.getpixel((64, 64))  # bright stays bright


def test_training_prompts_are_words_the_miniature_knows():
    import mini
    from train_mini.lora import prompts

    assert prompts(20, 1) == prompts(20, 1) != prompts(20, 2)
    assert all(not mini.unknown_words(prompt) for prompt in prompts(60, 3))


def test_exported_lora_is_read_and_names_what_it_was_trained_on(tmp_path):
    import checkpoint
    import lora
    import weights
    from train_mini.lora import export

    down, up = torch.ones(2, 192), torch.ones(192, 2)
    state = {"layers.0.attention.to_q.lora_A.weight": down, "layers.0.attention.to_q.lora_B.weight": up}
    file = lora.read(export(state, tmp_path / "gold.safetensors"))
    assert (file.report.matched, file.report.base) == (("layers.0.attention.to_q",), "turbo")
    base = weights.MINI_ROOT / file.header.metadata["trained_on"]
    assert file.header.metadata["trained_on_fingerprint"] == checkpoint.fingerprint([base])
