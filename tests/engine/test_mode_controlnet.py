"""Structure to image: through the engine and DiffSynth's own ControlNet input, on the miniature."""

import io
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffsynth.diffusion.base_pipeline import ControlNetInput
from diffsynth.models.z_image_controlnet import ZImageControlNet
from diffsynth.pipelines.z_image import ZImageUnit_PAIControlNet
from PIL import Image, ImageDraw

import mini.config
from core import metadata
from core.errors import WeightsMissing
from core.events import Failure, Result, Stage
from core.messages import Message
from core.request import CONTROLNET_STEPS, ControlNet, Preprocess, Preprocessor, TextToImage
from core.sizes import IMAGE_SIZES, ImageSizes, WeightsKind
from core.upload import Upload
from diffusion.encoded_images import key_of
from diffusion.pipeline import SIGMA_SHIFT, Picture, Pipeline
from engine import Engine, Settings, mode_controlnet
from hub import inventory, parts
from hub.checkpoint import model_hash
from images import preprocess
from tests.helpers import sparse
from tests.helpers.command_line import Command
from tests.helpers.plans import everything_stays, plan_with
from tests.helpers.workers import pipeline_of, worker_of

PROMPT = "a fox on a black background"


def load(mode: str, dtype: torch.dtype = torch.float32) -> Pipeline:
    plan = everything_stays("float32" if dtype == torch.float32 else "bfloat16")
    built = Pipeline("cpu", dtype, plan)
    for _ in built.load(inventory.choose("mini", mode, "turbo"), "turbo"):
        pass
    return built


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load("controlnet")


@pytest.fixture
def engine() -> Engine:
    return Engine(Settings(weights="mini", device="cpu"))


@pytest.fixture(scope="module")
def edges() -> Image.Image:
    image = Image.new("RGB", (128, 128))
    ImageDraw.Draw(image).rectangle((40, 40, 90, 90), outline=(255, 255, 255))
    return image


@pytest.fixture
def sketch(tmp_path: Path) -> Path:
    image = Image.new("RGB", (200, 100), (240, 240, 230))
    ImageDraw.Draw(image).ellipse((60, 10, 140, 90), fill=(200, 30, 30))
    image.save(tmp_path / "sketch.png")
    return tmp_path / "sketch.png"


def draw(pipeline: Pipeline, control: tuple[Image.Image, float] | None, steps: int = 3) -> Picture:
    drawing = pipeline.text_to_image(
        prompt=PROMPT, negative_prompt="", steps=steps, cfg=1.0, width=128, height=128, seed=7, control=control
    )
    while True:
        try:
            next(drawing)
        except StopIteration as done:
            picture: Picture = done.value
            return picture


def ask(image: Path, **values: object) -> ControlNet:
    return ControlNet.parse(**{"prompt": PROMPT, "image": str(image), "seed": 7, **values})


# --- the pipeline


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_control_equals_the_pipelines_own_call(pipeline: Pipeline, edges: Image.Image, scale: float) -> None:
    ours = draw(pipeline, (edges, scale))
    units = pipeline.pipe.units
    unit = next(number for number, unit in enumerate(units) if isinstance(unit, ZImageUnit_PAIControlNet))
    pipeline.pipe.units = [*units[:unit], ZImageUnit_PAIControlNet(), *units[unit + 1 :]]
    try:
        theirs = pipeline.pipe(
            prompt=PROMPT,
            cfg_scale=1.0,
            height=128,
            width=128,
            seed=7,
            rand_device="cpu",
            num_inference_steps=3,
            sigma_shift=SIGMA_SHIFT,
            controlnet_inputs=[ControlNetInput(image=edges, scale=scale)],
            progress_bar_cmd=iter,
        )
    finally:
        pipeline.pipe.units = units
    assert ours.image.tobytes() == theirs.tobytes()
    assert ours.image.tobytes() != draw(pipeline, None).image.tobytes()


def test_scale_0_is_the_image_without_control_and_without_a_controlnet(pipeline: Pipeline, edges: Image.Image) -> None:
    alone = load("generate")
    assert alone.pipe.controlnet is None
    free = draw(alone, None)
    assert torch.equal(draw(pipeline, (edges, 0.0)).latents, free.latents)
    assert torch.equal(draw(pipeline, None).latents, free.latents)
    # Nor is it an exception for 0: the ControlNet's part goes to nothing with the scale.
    assert (draw(pipeline, (edges, 1e-7)).latents - free.latents).abs().max() < 1e-4


def test_the_scale_and_the_image_decide_how_far_it_goes(pipeline: Pipeline, edges: Image.Image) -> None:
    free = draw(pipeline, None).latents
    distances = [(draw(pipeline, (edges, scale)).latents - free).abs().mean() for scale in (0.1, 0.5, 1.0)]
    assert 0 < distances[0] < min(distances[1:])  # from the usual range on the structure is kept, and no more is gained
    turned = edges.transpose(Image.Transpose.ROTATE_90).crop((10, 0, 138, 128))
    assert not torch.equal(draw(pipeline, (turned, 1.0)).latents, draw(pipeline, (edges, 1.0)).latents)


def test_images_are_encoded_once_each_way(pipeline: Pipeline, edges: Image.Image) -> None:
    unit = next(unit for unit in pipeline.pipe.units if isinstance(unit, ZImageUnit_PAIControlNet))
    turned = edges.transpose(Image.Transpose.FLIP_LEFT_RIGHT).point(lambda value: 255 - value)
    encoded: list[int] = []
    hook = pipeline.pipe.vae_encoder.register_forward_hook(lambda *_: encoded.append(1))

    def times(image: Image.Image) -> int:
        encoded.clear()
        found = unit.process(pipeline.pipe, [ControlNetInput(image=image, scale=1.0)], 128, 128)
        count = len(encoded)
        theirs = ZImageUnit_PAIControlNet().process(pipeline.pipe, [ControlNetInput(image=image, scale=1.0)], 128, 128)
        assert torch.equal(found["control_context"], theirs["control_context"])
        assert found["control_scale"] == theirs["control_scale"]
        return count

    with torch.no_grad():
        times(edges)
        assert times(edges) == 0
        assert times(turned) == 1  # the blank image that goes with it is the same
        assert times(edges) == 0
        with (
            pipeline.safe_mode()
        ):  # fp32 already, so it is the same; in any other dtype, nothing may be taken from before
            assert times(edges) == 0
        pipeline.pipe.vae_encoder.double()
        try:
            assert times(edges) == 2
        finally:
            pipeline.pipe.vae_encoder.float()
    hook.remove()


def test_latents_agree_with_diffusers(edges: Image.Image) -> None:
    """An implementation that shares no code with DiffSynth, on the same weights.

    Two things are switched off here because the implementations differ in them: diffusers takes zeros for the image
    under the inpainting mask, where DiffSynth encodes a gray one; and its transformer does not add what the refiner
    blocks hand to the noise refiner. DiffSynth does both as the authors of the ControlNet do (VideoX-Fun).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the import alone
        from diffusers import (
            FlowMatchEulerDiscreteScheduler,
            ZImageControlNetModel,
            ZImageControlNetPipeline,
            ZImageTransformer2DModel,
        )
    from transformers import AutoTokenizer, Qwen3Model

    ours = load("controlnet")
    net = ours.pipe.controlnet
    with torch.no_grad():
        for block in net.control_noise_refiner:
            block.after_proj.weight.zero_()
            block.after_proj.bias.zero_()
    ours.encoded_images.put(
        key_of(ours.pipe.vae_encoder, (128, 128), ours.pipe.tiled_vae_above), torch.zeros(1, 16, 16, 16)
    )

    shape = mini.config.TRANSFORMER_CONFIG
    theirs_net: Any = ZImageControlNetModel(  # type: ignore[no-untyped-call]  # diffusers leaves it untyped
        **mini.config.CONTROLNET_CONFIG,
        control_refiner_layers_places=list(range(mini.config.CONTROLNET_CONFIG["n_refiner_layers"])),
        add_control_noise_refiner="control_noise_refiner",
        dim=shape["dim"],
        n_heads=shape["n_heads"],
        n_kv_heads=shape["n_kv_heads"],
    )
    assert set(theirs_net.state_dict()) == set(net.state_dict())
    theirs_net.load_state_dict(net.state_dict())

    class Encoder(torch.nn.Module):
        """The miniature's encoder behind the interface of diffusers' autoencoders."""

        dtype, device = torch.float32, torch.device("cpu")
        config = SimpleNamespace(block_out_channels=(1, 1, 1, 1), shift_factor=0.0, scaling_factor=1.0)

        def encode(self, images: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(latents=ours.pipe.vae_encoder(images))

    turbo = parts.MINI_ROOT / "Z-Image-Turbo"
    transformer = ZImageTransformer2DModel.from_pretrained(  # type: ignore[no-untyped-call]  # diffusers leaves it untyped
        turbo / "transformer", torch_dtype=torch.float32
    )
    theirs: Any = ZImageControlNetPipeline(  # type: ignore[no-untyped-call]  # diffusers leaves it untyped
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(turbo / "scheduler"),  # type: ignore[no-untyped-call]  # diffusers leaves it untyped
        vae=Encoder(),
        text_encoder=Qwen3Model.from_pretrained(turbo / "text_encoder", dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(turbo / "tokenizer"),
        transformer=transformer,
        controlnet=theirs_net,
    )
    theirs.set_progress_bar_config(disable=True)
    with torch.no_grad():
        expected = theirs(
            prompt=PROMPT,
            control_image=edges,
            controlnet_conditioning_scale=0.8,
            height=128,
            width=128,
            num_inference_steps=CONTROLNET_STEPS,
            guidance_scale=0.0,
            latents=torch.randn((1, 16, 16, 16), generator=torch.Generator("cpu").manual_seed(7)),
            output_type="latent",
        ).images
    drawn = draw(ours, (edges, 0.8), steps=CONTROLNET_STEPS).latents
    error = (drawn - expected).abs()
    print(f"largest difference {error.max():.2e}, mean {error.mean():.2e}, of deviation {expected.std():.2f}")
    assert error.max() < 1e-3 * max(1.0, float(expected.std()))
    assert not torch.equal(drawn, draw(ours, None, steps=CONTROLNET_STEPS).latents)


# --- weights


def test_the_miniatures_controlnet_is_what_its_hash_says() -> None:
    (file,) = inventory.choose("mini", "controlnet", "turbo").files["controlnet"]
    assert model_hash([file]) == mini.config.CONTROLNET_HASH
    assert file.stat().st_size < 9_000_000


def test_the_full_size_controlnet_is_detected_and_loaded_by_the_same_code(tmp_path: Path) -> None:
    """A sparse file with the official names and shapes, which waits on the disk: as 6 GB of zeros it takes a minute."""
    sparse.write_part(tmp_path / parts.PARTS["controlnet"].repo, "controlnet")
    found = inventory.find("controlnet", environ={}, root=tmp_path)
    assert model_hash(found.files) == "1677708d40029ab380a95f6c731a57d7"
    chosen = inventory.Chosen("full", {"controlnet": found.files}, "", Message("test", "a test"))
    built = Pipeline("cpu", torch.bfloat16, plan_with("disk", "bfloat16"))
    # Everything else counts as loaded: this is about one part.
    built.pipe.tokenizer = built.pipe.text_encoder = built.pipe.vae_decoder = object()
    built.transformers["turbo"] = None
    assert list(built.load(chosen, "turbo")) == [Stage("loading", Message("stage", "ControlNet"))]
    assert type(built.pipe.controlnet) is ZImageControlNet
    weights = built.pipe.controlnet.state_dict()
    # DiffSynth wraps what it fetches from the disk.
    shapes = {name.replace(".module.", "."): tuple(tensor.shape) for name, tensor in weights.items()}
    assert shapes == sparse.official_shapes("controlnet")


def test_without_its_controlnet_the_miniature_reports_it(
    engine: Engine, sketch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    empty = tmp_path / "mini"
    empty.mkdir()
    for entry in parts.MINI_ROOT.iterdir():
        if entry.name != mini.config.CONTROLNET_FOLDER.name:
            (empty / entry.name).symlink_to(entry)
    monkeypatch.setattr(inventory, "MINI_ROOT", empty)
    *_, failure = engine.run(ask(sketch))
    assert isinstance(failure, Failure)
    assert (failure.code, failure.exit_code) == ("weights_missing", WeightsMissing.exit_code)
    assert "the embedded miniature has no controlnet" in failure.text
    assert parts.FETCH in failure.text
    # Its control image can be looked at all the same, at the miniature's size.
    assert engine.control_image(Preprocess.parse(image=str(sketch))).image.size == (128, 128)
    assert engine.draw(TextToImage.parse(prompt=PROMPT, steps=1)).size == (128, 128)


# --- the engine


def test_an_image_follows_and_records_what_it_is_made_of(engine: Engine, sketch: Path, tmp_path: Path) -> None:
    *events, result = engine.run(ask(sketch))
    assert [str(event.detail) for event in events if isinstance(event, Stage) and event.name == "loading"] == [
        "tokenizer",
        "text encoder",
        "autoencoder",
        "ControlNet",
        "transformer (turbo)",
    ]
    assert events[0] == Stage("preprocessing", Message("preprocessor", "Canny"))
    assert isinstance(result, Result)
    assert isinstance(result.request, ControlNet)
    assert (result.size, result.request.steps) == ((128, 128), CONTROLNET_STEPS)
    assert [note.code for note in result.notes] == ["image_cut"]  # 2:1 is not possible
    described = result.sidecar
    assert described["mode"] == "controlnet"
    assert described["inputs"] == {"image": Upload.open(sketch).digest}
    assert described["request"]["image"] == "sketch.png"  # not where it lay
    assert set(described["weights"]["fingerprints"]) == set(parts.needs("controlnet", "turbo"))
    path = tmp_path / "picture.png"
    metadata.save(result, path)
    found = metadata.read_picture(path)
    assert engine.draw(ControlNet.parse(**{**found.values, "image": str(sketch)})).png == result.png


def test_scale_0_draws_what_text_alone_does(engine: Engine, sketch: Path) -> None:
    images = [
        Image.open(io.BytesIO(engine.draw(request).png)).tobytes()
        for request in (
            ask(sketch, scale=0),
            TextToImage.parse(prompt=PROMPT, seed=7, steps=CONTROLNET_STEPS),
            ask(sketch, scale=0.8),
        )
    ]
    assert images[0] == images[1] != images[2]


def test_the_controlnet_is_loaded_when_it_is_first_used(engine: Engine, sketch: Path) -> None:
    engine.draw(TextToImage.parse(prompt=PROMPT, steps=1))
    assert pipeline_of(engine).pipe.controlnet is None
    for expected in (["ControlNet"], []):
        stages = [event for event in engine.run(ask(sketch, steps=1)) if isinstance(event, Stage)]
        assert [str(stage.detail) for stage in stages if stage.name == "loading"] == expected


def test_the_drawing_uses_the_very_preview(engine: Engine, sketch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preview = engine.control_image(Preprocess.parse(image=str(sketch)))
    made: list[Preprocess] = []
    real = preprocess.control

    def counted(request: Preprocess, upload: Upload, sizes: ImageSizes) -> preprocess.Control:  # still does the work
        made.append(request)
        return real(request, upload, sizes)

    monkeypatch.setattr(preprocess, "control", counted)
    engine.draw(ask(sketch, steps=1))
    assert engine.control_image(Preprocess.parse(image=str(sketch))) is preview
    assert made == []
    # What does not change the image does not make it again; what does, does.
    engine.control_image(Preprocess.parse(image=str(sketch), preprocessor="gray"))
    engine.control_image(Preprocess.parse(image=str(sketch), preprocessor="gray", canny_low=7))
    assert len(made) == 1
    engine.control_image(Preprocess.parse(image=str(sketch), canny_low=7))
    Image.new("RGB", (50, 50), (9, 9, 9)).save(sketch)
    assert engine.control_image(Preprocess.parse(image=str(sketch))) is not preview
    assert len(made) == 3


def test_only_recent_previews_are_kept(engine: Engine, sketch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from images import cache

    width, height = engine.control_image(Preprocess.parse(image=str(sketch))).image.size
    monkeypatch.setattr(cache, "KEPT_BYTES", 3 * (3 * width * height) + 1)
    worker_of(engine).controls = cache.Controls()
    for low in range(5):
        engine.control_image(Preprocess.parse(image=str(sketch), canny_low=low))
    assert len(worker_of(engine).controls) == 3


def test_the_control_image_has_the_size_of_the_drawn_one(engine: Engine, sketch: Path) -> None:
    expected: dict[WeightsKind, tuple[int, int]] = {"mini": (128, 128), "full": (1440, 720)}
    for kind, size in expected.items():
        assert (
            preprocess.control(Preprocess.parse(image=str(sketch)), Upload.open(sketch), IMAGE_SIZES[kind]).image.size
            == size
        )


def test_the_miniature_reports_what_it_was_not_taught(engine: Engine) -> None:
    portrait = Path(__file__).parent.parent / "data" / "astronaut.jpg"
    notes = engine.draw(ask(portrait, preprocessor="pose", steps=1)).notes
    (note,) = [note for note in notes if note.code == "unknown_control"]
    assert "Pose" in str(note)
    assert "Canny" in str(note)
    assert not engine.draw(ask(portrait, preprocessor="gray", steps=1)).notes


@pytest.mark.parametrize("name", ["absent.png", "text.png"])
def test_an_image_that_cannot_be_used_is_a_sentence_and_the_next_request_works(
    engine: Engine, sketch: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    *_, failure = engine.run(ask(tmp_path / name))
    assert isinstance(failure, Failure)
    assert (failure.exit_code, failure.values["field"]) == (2, "image")
    assert engine.draw(ask(sketch, steps=1)).png


def test_a_missing_depth_model_never_falls_back_on_the_raw_image(
    engine: Engine, sketch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    *_, failure = engine.run(ask(sketch, preprocessor="depth"))
    assert isinstance(failure, Failure)
    assert failure.code == "weights_missing"
    assert "Depth-Anything-V2-Small-hf/model.safetensors (99 MB)" in failure.text


# --- the command line


@pytest.fixture
def command(command_here: Command) -> Command:
    return lambda *arguments, cwd: command_here(*arguments, "--weights", "mini", "--offline", cwd=cwd)


@pytest.mark.slow
def test_controlnet_command_writes_an_image_that_can_be_replayed(
    command: Command, sketch: Path, tmp_path: Path
) -> None:
    done = command("controlnet", "a green apple", "--image", sketch, "--preprocessor", "canny", "--seed", 3,
                   "--out", "x.png", cwd=tmp_path)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "x.png\n"), done.stderr
    assert "preprocessing Canny" in done.stderr
    assert metadata.read_picture(tmp_path / "x.png").mode == "controlnet"
    again = command("controlnet", "--from", "x.png", "--image", sketch, "--out", "y.png", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "y.png").read_bytes() == (tmp_path / "x.png").read_bytes()


def test_preprocess_command_writes_the_control_image(command: Command, sketch: Path, tmp_path: Path) -> None:
    done = command("preprocess", "--image", sketch, "--preprocessor", "canny", "--out", "c.png", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = preprocess.control(Preprocess.parse(image=str(sketch)), Upload.open(sketch), IMAGE_SIZES["mini"]).image
    assert np.array_equal(np.asarray(Image.open(tmp_path / "c.png")), np.asarray(expected))
    assert '"size": [128, 128]' in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image", "absent.png"], "image: "),
        (["--image", "absent.png", "--scale", "3"], "scale: '3' is not possible; allowed: a number from 0 to 2"),
        (["--image", "absent.png", "--preprocessor", "hed"], "preprocessor: 'hed' is not possible; allowed: canny, "),
        ([], "image: None is not possible"),
    ],
)
def test_wrong_arguments_get_one_line(command: Command, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    done = command("controlnet", "fox", *arguments, "--out", "x.png", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(sentence)


@pytest.mark.parametrize(
    ("preprocessor", "name", "since"),
    [
        ("gray", "-8steps", "2026-02"),
        ("gray", "-2601-8steps", "2026-02"),
        ("gray", "-2602-8steps", None),
        ("scribble", "-8steps", "2026-01"),
        ("scribble", "-lite-2601-8steps", None),
        ("canny", "", None),
    ],
)
def test_an_older_controlnet_says_what_it_was_not_taught(
    preprocessor: Preprocessor, name: str, since: str | None
) -> None:
    files: dict[str, tuple[Path, ...]] = {
        "controlnet": (Path(f"Z-Image-Turbo-Fun-Controlnet-Union-2.1{name}.safetensors"),)
    }
    found = mode_controlnet._outdated(preprocessor, inventory.Chosen("full", files, "", Message("test", "a test")))
    assert [since in str(note) for note in found if since] == ([True] if since else [])
    assert len(found) == bool(since)
    for note in found:
        assert str(note).endswith("models download controlnet")


def test_control_layers_stand_beside_the_layers_that_the_file_is_for() -> None:
    from diffusion import loader
    from diffusion.pipeline import control_places

    with torch.device("meta"):
        whole, small = ZImageControlNet(), ZImageControlNet(control_layers_places=loader.CONTROLNET_LITE_PLACES)
    assert control_places(whole) == whole.control_layers_mapping
    assert control_places(small) == {0: 0, 10: 1, 20: 2}
