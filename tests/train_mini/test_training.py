"""The miniature's training code: scenes, captions, couplings, the batched forward, the optimiser."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mini.config
from mini.config import TEXT_ENCODER_CONFIG
from mini.models import MiniTextEncoder
from train_mini import base, captions, chinese, export, muon, pools, text_encoder, transformer, turbo
from train_mini.captions import Said, article, describe, plural, random_caption
from train_mini.probe import rivals, turbo_sigmas
from train_mini.scenes import (
    LAYOUTS,
    PICTURE_SIDE,
    AtlasPainter,
    Scene,
    held_out,
    kind_of,
    leading_hue,
    training_scenes,
)
from train_mini.scenes import (
    test_scenes as scenes_to_test,
)
from train_mini.text_encoder import completed
from train_mini.things import (
    ARRANGEMENTS,
    BACKGROUNDS,
    COLOURABLE,
    COLOURS,
    NO_ARTICLE,
    PLACES,
    PLURALS,
    SIZES,
    THINGS,
    WAY_NAMES,
)
from train_mini.vocabulary import vocabulary

pytestmark = pytest.mark.slow

ATLAS = Path(__file__).parent.parent / "data" / "mini_icons.png"
EVERYTHING = frozenset(("background", "size", "place", "colour"))


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return training_scenes()


# ---- scenes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["single", "coloured", "pair", "count"])
def test_held_out_combinations_never_train(scenes: list[Scene], kind: str) -> None:
    held = scenes_to_test(kind, 60)
    assert len(held) == 60
    assert scenes_to_test(kind, 20) == held[:20]
    assert all(kind_of(scene) == kind and held_out(scene) for scene in held)
    ways = {replace(scene, mirrored=way) for scene in held for way in (False, True)}
    assert not ways & set(scenes)
    if kind == "coloured":  # the thing never has that colour anywhere
        assert not {(s.thing, s.colour) for s in held} & {(s.thing, s.colour) for s in scenes}
    if kind == "pair":
        assert not {frozenset((s.thing, s.second)) for s in held} & {frozenset((s.thing, s.second)) for s in scenes}


def test_about_a_tenth_is_held_out() -> None:
    from train_mini.scenes import coloured, counts, pairs, singles

    for made in (singles(), coloured(4), pairs(2000), counts()):
        assert 0.05 < np.mean([held_out(scene) for scene in made]) < 0.15


def test_the_world_is_as_large_as_promised(scenes: list[Scene]) -> None:
    names = [name for group in THINGS.values() for name in group]
    assert len(THINGS) >= 150
    assert len(BACKGROUNDS) >= 10
    assert len(SIZES) == 3
    assert len(PLACES) == 9
    assert len(names) == len(set(names))
    assert set(names) >= NO_ARTICLE
    assert set(COLOURABLE) <= set(THINGS)
    assert len(COLOURABLE) >= 40
    assert {scene.thing for scene in scenes} == set(THINGS)
    assert {(s.size, s.place) for s in scenes if s.arrangement == "one"} == set(LAYOUTS)
    assert {s.mirrored for s in scenes if s.arrangement == "one"} == {False, True}
    assert not any(s.mirrored for s in scenes if s.arrangement != "one")


def test_icons_lie_on_the_patch_grid_and_inside_the_picture() -> None:
    for size, place in LAYOUTS:
        room = PICTURE_SIDE - SIZES[size]
        assert all(room // 2 * step % 16 == 0 for step in PLACES[place])
    for corners in ARRANGEMENTS.values():
        assert all(v % 16 == 0 and 0 <= v <= PICTURE_SIDE - SIZES["small"] for corner in corners for v in corner)


def test_painting_puts_icons_where_the_scene_says() -> None:
    painter = AtlasPainter(ATLAS)

    def box(scene: Scene) -> tuple[int, int, int, int]:
        away = np.abs(np.asarray(painter.paint(scene)).astype(int) - BACKGROUNDS[scene.background]).max(-1) > 24
        rows, columns = np.flatnonzero(away.any(1)), np.flatnonzero(away.any(0))
        return rows[0], columns[0], rows[-1], columns[-1]

    top, _, _, right = box(Scene("soccer-ball", "blue", "small", "bottom left"))
    assert top >= 64
    assert right <= 64
    assert box(Scene("soccer-ball", "blue", "large"))[2] > 110
    both = Scene("fox", "white", second="lion", arrangement="above")
    assert painter.paint(both).crop((0, 0, 128, 64)).tobytes() != painter.paint(both).crop((0, 64, 128, 128)).tobytes()
    car = Scene("automobile", "white")
    assert painter.paint(car).tobytes() != painter.paint(replace(car, mirrored=True)).tobytes()


@pytest.mark.parametrize("colour", COLOURS)
def test_tint_gives_the_leading_hue_the_colour(colour: str) -> None:
    painter = AtlasPainter(ATLAS)
    plain, tinted = painter.icon("red-heart", 64), painter.icon("red-heart", 64, colour)
    mask, share = leading_hue(plain)
    assert share > 0.8
    middle = np.median(np.asarray(tinted)[mask][:, :3], axis=0)
    assert min(COLOURS, key=lambda name: float(np.abs(middle - COLOURS[name]).sum())) == colour
    assert np.array_equal(np.asarray(plain)[..., 3], np.asarray(tinted)[..., 3])


# ---- captions --------------------------------------------------------------------------------------------------------


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
def test_article(words: str, noun: str, expected: str) -> None:
    assert article(words, noun) == expected


@pytest.mark.parametrize(
    ("noun", "expected"),
    [("fox", "foxes"), ("butterfly", "butterflies"), ("key", "keys"), ("mouse", "mice"), ("church", "churches"),
     ("bus", "buses"), ("glass of wine", "glasses of wine"), ("taxi", "taxis")],
)  # fmt: skip
def test_plural(noun: str, expected: str) -> None:
    assert plural(noun) == expected


def test_irregular_plurals_are_of_known_names() -> None:
    assert set(PLURALS) <= {name for names in THINGS.values() for name in names}


def test_captions_say_the_scene_and_nothing_else(scenes: list[Scene]) -> None:
    rng = random.Random(0)
    for scene in rng.sample(scenes, 3000):
        made = random_caption(scene, rng)
        assert made.said.fits(scene), made


def test_captions_put_everything_into_words() -> None:
    rng = random.Random(1)
    car = Scene("automobile", "gray", "small", "top left", "purple")
    for _ in range(60):
        text = describe(car, rng, EVERYTHING).text
        assert "car" in text
        assert "purple" in text or "violet" in text
        assert "gray" in text or "grey" in text
        assert any(word in text for word in ("small", "little", "tiny"))
        assert "left" in text
        assert "  " not in text
        assert ",," not in text
        assert not text.endswith(",")
    assert "three foxes" in {
        describe(Scene("fox", "red", arrangement="three"), rng, frozenset()).text for _ in range(60)
    }
    chinese_text = describe(car, rng, EVERYTHING, in_chinese=True).text
    assert "汽车" in chinese_text
    assert "紫色" in chinese_text
    assert "左上" in chinese_text


def test_captions_say_what_is_mirrored_and_nothing_of_what_is_not() -> None:
    rng = random.Random(4)
    for in_chinese, names in ((False, WAY_NAMES["mirrored"]), (True, chinese.WAY_NAMES["mirrored"])):
        for mirrored in (False, True):
            scene = Scene("fox", "blue", "small", "left", mirrored=mirrored)
            made = [describe(scene, rng, EVERYTHING, in_chinese=in_chinese) for _ in range(80)]
            assert all(any(name in one.text for name in names) == mirrored == one.said.mirrored for one in made)


def test_a_mirrored_thing_has_the_code_of_its_mirrored_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export.take_back(mini.config.FOLDER, tmp_path)
    monkeypatch.setattr(text_encoder, "Painter", lambda work: AtlasPainter(ATLAS))
    codes = text_encoder.Codes(tmp_path)
    plain, turned = (codes(Said("fox", "blue", arrangement="one", mirrored=way)) for way in (False, True))
    assert not torch.allclose(plain[0], turned[0], atol=0.5)
    assert not torch.allclose(plain[2], turned[2], atol=0.5)
    frog = [codes(Said("frog", mirrored=way))[0] for way in (False, True)]
    assert torch.allclose(frog[0], frog[1], atol=0.1)  # it looks the same both ways round
    assert torch.equal(codes(Said("fox")), codes(Said("fox", mirrored=False)))


def test_shares_of_what_captions_leave_open() -> None:
    rng, scene = random.Random(2), Scene("fox", "blue", "small", "left")
    made = [random_caption(scene, rng) for _ in range(4000)]
    assert 0.08 < np.mean([not m.text for m in made]) < 0.12
    named = [m.said for m in made if m.said.thing]
    assert 0.2 < np.mean([s.background is None for s in named]) < 0.3
    assert 0.35 < np.mean([s.size is None for s in named]) < 0.45
    assert 0.4 < np.mean([s.place is None for s in named]) < 0.5


def test_pairs_joined_by_and_leave_open_how_they_stand() -> None:
    rng, scene = random.Random(3), Scene("fox", "blue", second="lion", arrangement="above")
    for _ in range(80):
        made = describe(scene, rng, EVERYTHING, ("{a}",))
        says = any(word in made.text for word in ("above", "over", "top", "below", "under", "beneath"))
        assert says == (made.said.arrangement == "above"), made


def test_wordings_of_evaluation_are_held_out() -> None:
    trained = {*captions.TEMPLATES_FULL, *captions.TEMPLATES_NO_BACKGROUND}
    assert not trained & set(captions.TEST_TEMPLATES)
    known = {*chinese.TEMPLATES_FULL, *chinese.TEMPLATES_PLACE, *chinese.TEMPLATES_NO_BACKGROUND}
    assert not known & {*chinese.TESTS_FULL, *chinese.TESTS_PLACE}


def test_chinese_names_part_all_things() -> None:
    names = [name for names in chinese.THING_NAMES.values() for name in names]
    assert len(chinese.THING_NAMES) == len(THINGS)
    assert len(names) == len(set(names))


def test_stray_words_leave_what_a_caption_says_whole() -> None:
    rng = random.Random(5)
    for scene, in_chinese in ((Scene("soft-ice-cream", "red"), False), (Scene("fox", "blue"), True)):
        made = describe(scene, rng, frozenset(("background",)), in_chinese=in_chinese)
        sprinkled = [text_encoder.sprinkle(made.text, rng, ["monorail"]) for _ in range(60)]
        assert len(set(sprinkled)) > 50
        names = THINGS["soft-ice-cream"] if not in_chinese else chinese.THING_NAMES["fox"]
        assert all(any(name in text for name in names) for text in sprinkled)
    assert [text_encoder.splits_name("an ice cream.", at) for at in (2, 3, 6, 12)] == [False, False, True, False]


def test_stray_characters_are_in_no_chinese_name_and_no_sentence() -> None:
    ours = "".join(str(value) for name, value in vars(chinese).items() if name.isupper())
    stray = text_encoder.stray_characters()
    assert len(stray) > 3000
    assert not set(stray) & set(ours)


def test_training_goes_on_from_an_exported_miniature(tmp_path: Path) -> None:
    (tmp_path / "start.pt").write_bytes(b"kept")
    export.take_back(mini.config.FOLDER, tmp_path)
    encoder = MiniTextEncoder()
    encoder.load_state_dict(torch.load(tmp_path / "text_encoder_start.pt", weights_only=True))
    ids, mask = text_encoder.tokenize(text_encoder.load_tokenizer(tmp_path), ["a fox", "画一只狐狸"])
    assert ids.shape == mask.shape
    assert len(ids) == 2
    assert (tmp_path / "autoencoder.pt").exists()
    assert (tmp_path / "start.pt").read_bytes() == b"kept"


def test_what_was_exported_and_taken_back_is_exported_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, folder = tmp_path / "work", tmp_path / "mini"
    work.mkdir()
    export.take_back(mini.config.FOLDER, work)
    for start, name in (("text_encoder_start.pt", "text_encoder.pt"), ("start.pt", "base.pt")):
        (work / start).rename(work / name)
    monkeypatch.setattr(export, "Painter", lambda work: AtlasPainter(ATLAS))
    atlas = ATLAS.stat().st_mtime_ns
    export.export(work, folder)
    for path in folder.rglob("*.safetensors"):
        original = mini.config.FOLDER / path.relative_to(folder)
        if path.relative_to(folder).parts[:2] == ("Z-Image-Turbo", "transformer"):
            original = mini.config.FOLDER / "Z-Image" / path.relative_to(folder / "Z-Image-Turbo")  # no Turbo was there
        written, expected = load_file(path), load_file(original)
        assert written.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    assert ATLAS.stat().st_mtime_ns == atlas
    with Image.open(work / "icons.png") as made, Image.open(ATLAS) as expected_atlas:
        assert made.size == expected_atlas.size


# ---- couplings -------------------------------------------------------------------------------------------------------


def test_meanings_finds_exactly_the_fitting_scenes(scenes: list[Scene]) -> None:
    part = random.Random(4).sample(scenes, 20_000)
    meanings = pools.Meanings(part)
    for said in (
        Said(),
        Said(background="turquoise"),
        Said("fox", arrangement="one"),
        Said("automobile", background="white", colour="red", arrangement="one"),
        Said("fox", arrangement="three"),
        Said("lion", "blue", "small", "left", arrangement="one"),
        Said("lion", arrangement="one", mirrored=False),
        Said("lion", arrangement="one", mirrored=True),
    ):
        expected = [row for row, scene in enumerate(part) if said.fits(scene) and (not said.thing or not scene.second)]
        assert sorted(set(meanings.rows(said).tolist())) == expected


def test_a_noise_gets_the_picture_it_resembles_and_every_picture_its_share() -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(1, 5, 64, generator=generator) * torch.tensor([1, 1, 2, 3, 1]).view(1, 5, 1)
    noise = torch.randn(4000, 64, generator=generator)
    chosen = pools.couple(pictures.expand(4000, -1, -1), noise)
    shares = torch.bincount(chosen, minlength=5) / 4000
    assert shares.min() > 0.1
    assert shares.max() < 0.35
    assert pools.couple(pictures, pictures[:, 3] - pictures.mean(1)).tolist() == [3]


def test_a_noise_wishes_the_layout_whose_patches_say_so() -> None:
    noise = torch.randn(3000, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    singles = pools.wishes(noise)[:, : len(LAYOUTS)]
    shares = torch.bincount(singles.argmax(1), minlength=len(LAYOUTS)) / len(noise)
    assert shares.min() > 0.02
    assert shares.max() < 0.3
    assert torch.allclose(pools.wishes(noise + 7.0), pools.wishes(noise), atol=1e-3)  # no plain colour changes it
    calm = torch.zeros(1, 16, 16, 16)
    board = 1 - 2.0 * ((torch.arange(8)[:, None] + torch.arange(8)) % 2)
    calm[0, pools.WISH_CHANNEL, :8, 8:] = 3 * board
    assert pools.LAYOUT_NAMES[int(pools.wishes(calm).argmax())] == ("one", "small", "top right")


def test_wished_keeps_one_layout_of_those_that_fit(scenes: list[Scene]) -> None:
    part = random.Random(4).sample(scenes, 20_000)
    meanings = pools.Meanings(part)
    wish = torch.zeros(len(pools.LAYOUT_NAMES))
    wish[pools.LAYOUT_NUMBERS["one", "large", "centre"]] = 2
    wish[pools.LAYOUT_NUMBERS["one", "small", "left"]] = 1
    large = meanings.wished(meanings.rows(Said("fox", arrangement="one")), wish.numpy())
    assert {pools.layout_of(part[row]) for row in large} == {("one", "large", "centre")}
    small = meanings.wished(meanings.rows(Said("fox", size="small", arrangement="one")), wish.numpy())
    assert {pools.layout_of(part[row]) for row in small} == {("one", "small", "left")}


def test_what_a_seed_adds_to_a_caption_is_said() -> None:
    rng, known = random.Random(3), vocabulary()
    open_one = captions.Caption("a fox", Said("fox", arrangement="one"))
    made = [completed(open_one, rng, known, 1.0) for _ in range(40)]
    assert all(one.said.size and one.said.place and one.text != "a fox" for one in made)
    assert all(bool(one.said.mirrored) == ("mirrored" in one.text) for one in made)
    assert {bool(one.said.mirrored) for one in made} == {False, True}
    pair = captions.Caption("a fox and a lion", Said("fox", second="lion"))
    assert completed(pair, rng, known, 1.0) == pair


def test_rivals_differ_in_one_thing() -> None:
    for scene in (*scenes_to_test("single", 4), *scenes_to_test("coloured", 4), *scenes_to_test("pair", 4)):
        competing = rivals(scene, random.Random(0))
        assert scene in competing[:2]
        assert len(competing) == len(set(competing)) > 20


def test_walk_is_the_mean_velocity_of_its_steps() -> None:
    x, start, end = torch.randn(2, 1, 2, 2), torch.tensor([1.0, 0.6]), torch.tensor([0.8, 0.0])
    constant = turbo.walk(lambda here, sigma: torch.ones_like(here), x, start, end, 3)
    assert torch.allclose(constant, torch.ones_like(x), atol=1e-6)
    seen: list[torch.Tensor] = []

    def guided(here: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(sigma)
        return here

    turbo.walk(guided, x, start, end, 2)
    assert torch.allclose(torch.stack(seen), torch.tensor([[1.0, 0.6], [0.9, 0.3]]))
    sigmas = turbo_sigmas()
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert len(sigmas) == 9


# ---- transformer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [19, 32, 45])
@pytest.mark.parametrize("timestep", [1000.0, 437.0])
def test_batched_forward_equals_diffsynths(words: int, timestep: float) -> None:
    from diffsynth.pipelines.z_image import model_fn_z_image_turbo

    from diffusion.pipeline import follow_weight_dtype

    model = transformer.build()
    follow_weight_dtype(model.t_embedder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():  # away from the start, where modulation is zero
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
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


def test_start_values_leave_no_uninitialised_memory() -> None:
    a, b = transformer.build().state_dict(), transformer.build().state_dict()
    assert all(torch.isfinite(v).all() and torch.equal(v, b[k]) for k, v in a.items())


def test_muon_steps_are_nearly_orthogonal() -> None:
    g = torch.randn(3, 48, 96, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(muon.orthogonalise(g, 5, torch.float32))
    assert values.min() > 0.4
    assert values.max() < 1.4


def test_sigma_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    high = base.draw_sigma(64, 64, generator)
    every = base.draw_sigma(6400, 800, generator)
    assert high.min() >= 0.88
    assert high.max() <= 1.0
    assert every.min() < 0.15
    assert every.max() > 0.99
    assert 0.5 < every.median() < 0.75


# --- the example LoRA ---


def test_gilding_turns_things_to_gold_and_leaves_the_background() -> None:
    from PIL import Image, ImageDraw

    from train_mini.lora import gilded

    picture = Image.new("RGB", (128, 128), (40, 90, 200))
    ImageDraw.Draw(picture).ellipse((32, 32, 96, 96), fill=(250, 250, 255))
    ImageDraw.Draw(picture).ellipse((48, 48, 80, 80), fill=(20, 160, 60))
    golden = gilded(picture)
    assert golden.getpixel((4, 4)) == (40, 90, 200)
    pixels = np.asarray(golden)
    outer, inner = pixels[64, 36].tolist(), pixels[64, 64].tolist()
    for red, green, blue in (outer, inner):
        assert red > green > blue
    assert outer > inner  # bright stays bright


def test_training_prompts_are_words_the_miniature_knows() -> None:
    import mini.config
    from train_mini.lora import prompts

    assert prompts(20, 1) == prompts(20, 1) != prompts(20, 2)
    assert all(not mini.config.unknown_words(prompt) for prompt in prompts(60, 3))


def test_exported_lora_is_read_and_names_what_it_was_trained_on(tmp_path: Path) -> None:
    import lora.file
    from hub import checkpoint, parts
    from train_mini.lora import export

    down, up = torch.ones(2, 192), torch.ones(192, 2)
    state = {"layers.0.attention.to_q.lora_A.weight": down, "layers.0.attention.to_q.lora_B.weight": up}
    file = lora.file.read(export(state, tmp_path / "gold.safetensors"))
    assert (file.report.matched, file.report.base) == (("layers.0.attention.to_q",), "turbo")
    base = parts.MINI_ROOT / file.header.metadata["trained_on"]
    assert file.header.metadata["trained_on_fingerprint"] == checkpoint.fingerprint([base])
