"""Our step loop and our prompt unit, held against DiffSynth's own pipeline and against diffusers."""

import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffsynth.models.model_loader import ModelPool
from diffsynth.pipelines.z_image import ZImagePipeline

from core.events import Stage, Step, TileDone
from core.request import Model
from diffusion.measure import Dtype
from diffusion.memory import Placement
from diffusion.pipeline import SIGMA_SHIFT, Picture, Pipeline
from diffusion.variety import varied_steps
from hub import inventory
from hub.parts import MINI_ROOT
from tests.helpers.plans import everything_stays

PROMPT = "a large fox on a black background"
NEGATIVE = "blue background"
RUNS: list[tuple[Model, int, float]] = [("turbo", 8, 1.0), ("base", 25, 4.0)]


def select(pipeline: Pipeline, model: Model) -> None:
    pipeline.pipe.dit = pipeline.transformers[model]


def run(pipeline: Pipeline, model: Model, **values: object) -> tuple[Picture, list[Stage | Step | TileDone]]:
    select(pipeline, model)
    asked: dict[str, Any] = {  # as `text_to_image` takes them
        "prompt": PROMPT,
        "negative_prompt": "",
        "steps": 8,
        "cfg": 1.0,
        "width": 128,
        "height": 128,
        "seed": 7,
        **values,
    }
    events = []
    drawing = pipeline.text_to_image(**asked)
    while True:
        try:
            events.append(next(drawing))
        except StopIteration as done:
            return done.value, events


@pytest.mark.parametrize(("model", "steps", "cfg"), RUNS)
def test_step_loop_equals_the_pipelines_own_call(pipeline: Pipeline, model: Model, steps: int, cfg: float) -> None:
    ours, _ = run(pipeline, model, steps=steps, cfg=cfg, negative_prompt=NEGATIVE)
    theirs = pipeline.pipe(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        cfg_scale=cfg,
        height=128,
        width=128,
        seed=7,
        rand_device="cpu",
        num_inference_steps=steps,
        sigma_shift=SIGMA_SHIFT,
        progress_bar_cmd=iter,
    )
    assert ours.image.tobytes() == theirs.tobytes()


@pytest.mark.parametrize(("model", "steps", "cfg"), RUNS)
def test_latents_agree_with_diffusers(pipeline: Pipeline, model: Model, steps: int, cfg: float) -> None:
    """An implementation that shares no code with DiffSynth, from the same folders, noise, prompt and steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the import alone
        from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
        from diffusers import ZImagePipeline as DiffusersPipeline
    from transformers import AutoTokenizer, Qwen3Model

    turbo = MINI_ROOT / "Z-Image-Turbo"
    own = turbo if model == "turbo" else MINI_ROOT / "Z-Image"
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(own / "scheduler")  # type: ignore[no-untyped-call]  # diffusers leaves it untyped
    transformer = ZImageTransformer2DModel.from_pretrained(  # type: ignore[no-untyped-call]  # diffusers leaves it untyped
        own / "transformer", torch_dtype=torch.float32
    )
    # Any: what diffusers composes of mixins has no types
    theirs: Any = DiffusersPipeline(  # type: ignore[no-untyped-call]  # diffusers leaves it untyped
        scheduler=scheduler,
        vae=None,
        text_encoder=Qwen3Model.from_pretrained(turbo / "text_encoder", dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(turbo / "tokenizer"),
        transformer=transformer,
    )
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn((1, 16, 16, 16), generator=torch.Generator("cpu").manual_seed(7))
    expected = theirs(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=128,
        width=128,
        num_inference_steps=steps,
        # positive + g (positive - negative) there, negative + s (positive - negative) here
        guidance_scale=cfg - 1,
        latents=noise,
        output_type="latent",
    ).images
    ours, _ = run(pipeline, model, steps=steps, cfg=cfg, negative_prompt=NEGATIVE)
    error = (ours.latents - expected).abs()
    print(f"{model}: largest difference {error.max():.2e}, mean {error.mean():.2e}, of deviation {expected.std():.2f}")
    assert error.max() < AGREEMENT


# Largest difference of a latent, where latents have a deviation of about 1; fp32 rounding over 25 guided steps came
# to 1.4e-6.
AGREEMENT = 1e-4


def test_events_come_per_stage_and_per_step(pipeline: Pipeline) -> None:
    _, events = run(pipeline, "turbo", steps=3)
    assert events == [Stage("encoding"), Stage("denoising"), Step(1, 3), Step(2, 3), Step(3, 3), Stage("decoding")]


def test_closing_stops_within_a_step_and_skips_decoding(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    select(pipeline, "turbo")
    called = []
    # Counts calls of the real models; replaces nothing of them.
    hooks = [
        pipeline.pipe.dit.all_final_layer["2-1"].register_forward_hook(lambda *_: called.append("dit")),
        pipeline.pipe.vae_decoder.register_forward_hook(lambda *_: called.append("decoder")),
    ]
    drawing = pipeline.text_to_image(prompt=PROMPT, negative_prompt="", steps=8, cfg=1.0, width=128, height=128, seed=7)
    while next(drawing) != Step(2, 8):
        pass
    drawing.close()
    for hook in hooks:
        hook.remove()
    assert called == ["dit", "dit"]
    again, _ = run(pipeline, "turbo")
    assert again.image.tobytes() == run(pipeline, "turbo")[0].image.tobytes()


def test_grad_mode_is_left_as_it_was_between_events(pipeline: Pipeline) -> None:
    select(pipeline, "turbo")
    drawing = pipeline.text_to_image(prompt=PROMPT, negative_prompt="", steps=2, cfg=1.0, width=128, height=128, seed=7)
    assert all(torch.is_grad_enabled() for _ in drawing)


def test_a_cut_prompt_is_noted_each_time_it_is_drawn(pipeline: Pipeline) -> None:
    long = "a large fox on a black background " * 100
    for _ in range(2):
        picture, _ = run(pipeline, "turbo", steps=1, prompt=long)
        assert [note.code for note in picture.notes] == ["prompt_cut"]
    guided, _ = run(pipeline, "base", steps=1, cfg=4.0, prompt=long, negative_prompt=f"no {long}")
    assert [note.code for note in guided.notes] == ["prompt_cut", "prompt_cut"]
    assert not run(pipeline, "turbo", steps=1, negative_prompt=long)[0].notes  # without guidance it is not used


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_timestep_embedder_follows_its_weights(pipeline: Pipeline, dtype: torch.dtype) -> None:
    from diffsynth.models.z_image_dit import TimestepEmbedder

    from diffusion.pipeline import follow_weight_dtype

    embedder = TimestepEmbedder(16, 32).to(dtype)
    original = embedder(torch.tensor([500.0])) if dtype is torch.bfloat16 else None
    follow_weight_dtype(embedder)
    ours = embedder(torch.tensor([500.0]))
    assert ours.dtype == dtype
    if original is not None:
        assert torch.equal(ours, original)


def test_one_transformer_at_a_time_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    built = Pipeline("cpu", torch.float32, everything_stays(other_transformer="goes"))
    alive: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
    read = built._read
    pictures: dict[Model, list[bytes]] = {}

    def watched(files: list[Path], part: str) -> ModelPool:
        assert part != "transformer" or not alive  # the last one is gone when the next is read
        return read(files, part)

    monkeypatch.setattr(built, "_read", watched)
    models: tuple[Model, ...] = ("turbo", "base", "turbo")
    for model in models:
        for _ in built.load(inventory.choose("mini", "generate", model), model):
            pass
        assert list(built.transformers) == [model]
        alive.add(built.transformers[model])
        pictures.setdefault(model, []).append(run(built, model)[0].image.tobytes())
    assert pictures["turbo"][0] == pictures["turbo"][1] != pictures["base"][0]


def test_loaded_parts_are_not_loaded_again(pipeline: Pipeline) -> None:
    assert list(pipeline.load(inventory.choose("mini", "generate", "base"), "base")) == []
    assert pipeline.pipe.dit is pipeline.transformers["base"]


def test_pipeline_parts_are_diffsynths_own(pipeline: Pipeline) -> None:
    from diffsynth.models.z_image_dit import ZImageDiT

    assert type(pipeline.pipe).__bases__ == (ZImagePipeline,)
    assert all(type(transformer) is ZImageDiT for transformer in pipeline.transformers.values())
    parameters = [p for transformer in pipeline.transformers.values() for p in transformer.parameters()]
    assert all(p.dtype is torch.float32 and torch.isfinite(p).all() for p in parameters)


def test_nothing_of_diffsynths_reaches_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    """Not while it loads and draws; that it says nothing when it is imported, test_cli's first process shows."""
    built = Pipeline("cpu", torch.float32, everything_stays())
    list(built.load(inventory.choose("mini", "generate", "turbo"), "turbo"))
    run(built, "turbo", steps=1)
    assert capfd.readouterr().out == ""


def test_variety_moves_seeds_apart_by_the_first_steps_alone(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing but the noise is left to the seed.
    prompt, drawn = "a small pear on the left on a blue background", {}
    for variety in (0.0, 1.0):
        pictures = [run(pipeline, "turbo", prompt=prompt, seed=seed, variety=variety)[0].image for seed in (1, 2, 1)]
        drawn[variety] = [np.asarray(picture).astype(float) for picture in pictures]
        assert pictures[0].tobytes() == pictures[2].tobytes()  # a seed is still one picture
    apart = {variety: np.abs(first - second).mean() for variety, (first, second, _) in drawn.items()}
    assert apart[1.0] > 1.3 * apart[0.0]
    seen: list[torch.Tensor] = []
    predict = pipeline.denoiser.predict  # it still runs: only what it is given is written down

    def watched(latents: torch.Tensor, timestep: torch.Tensor, captions: list[torch.Tensor], control: None) -> Any:
        seen.append(captions[0])
        return predict(latents, timestep, captions, control)

    monkeypatch.setattr(pipeline.denoiser, "predict", watched)
    run(pipeline, "turbo", variety=1.0)
    with torch.no_grad():
        exact = pipeline.denoiser.caption(pipeline.prompts.encode(PROMPT).embedding)
    assert [torch.equal(caption, exact) for caption in seen] == [False] * 2 + [True] * 6


@pytest.mark.parametrize(("steps", "changed"), [(1, 1), (3, 1), (8, 2), (25, 6)])
def test_variety_leaves_most_steps_alone(steps: int, changed: int) -> None:
    assert varied_steps(steps) == changed


def test_bf16_on_a_cpu_draws_nearly_the_same_image() -> None:
    """What the real weights compute in where a processor is faster in bf16, each part apart and all together."""
    drawn = {}
    parts = ("transformer", "text_encoder", "vae")
    for changed in ((), *((part,) for part in parts), parts):
        dtypes: dict[str, Dtype] = {part: "bfloat16" if part in changed else "float32" for part in parts}
        places = {part: Placement("device", dtype) for part, dtype in dtypes.items()}
        plan = everything_stays(
            dtypes["transformer"], parts=places, text_dtype=dtypes["text_encoder"], vae_dtype=dtypes["vae"]
        )
        built = Pipeline("cpu", getattr(torch, dtypes["transformer"]), plan)
        list(built.load(inventory.choose("mini", "generate", "turbo"), "turbo"))
        picture, _ = run(built, "turbo", prompt="a red apple")
        models = {"transformer": built.pipe.dit, "text_encoder": built.pipe.text_encoder, "vae": built.pipe.vae_decoder}
        assert {part: str(next(model.parameters()).dtype) for part, model in models.items()} == {
            part: f"torch.{dtype}" for part, dtype in dtypes.items()
        }
        drawn[changed] = np.asarray(picture.image).astype(float)
    exact = drawn.pop(())
    # At most 1.3 of 255, by how the processor rounds.
    assert all(0 < np.abs(near - exact).mean() < 2 for near in drawn.values())


def layers_of_real_width() -> Iterator[tuple[str, Callable[[torch.dtype], torch.Tensor]]]:
    """Yield one layer of each part at its real width with random weights, by what it answers in a dtype."""
    from diffsynth.models.flux_vae import FluxVAEDecoder
    from diffsynth.models.z_image_dit import RopeEmbedder, ZImageTransformerBlock
    from transformers import Qwen3Config, Qwen3Model

    def randomly(model: torch.nn.Module) -> torch.nn.Module:
        for parameter in model.parameters():
            if parameter.ndim > 1:
                bound = (3 / parameter[0].numel()) ** 0.5  # of numbers whose variance is 1 / inputs
                parameter.data.uniform_(-bound, bound)
        return model.eval()

    block = randomly(ZImageTransformerBlock(0, 3840, 30, 30, 1e-5, True))
    tokens, time = torch.randn(1, 32, 3840), torch.randn(1, 256)
    rotations = RopeEmbedder()(torch.arange(32)[:, None].expand(-1, 3))[None]
    mask = torch.ones(1, 32, dtype=torch.bool)
    yield "transformer", lambda dtype: block.to(dtype)(tokens.to(dtype), mask, rotations, time.to(dtype))
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )
    text = randomly(Qwen3Model(config))
    yield "text_encoder", lambda dtype: text.to(dtype)(torch.arange(32)[None]).last_hidden_state
    decoder, latents = randomly(FluxVAEDecoder()), torch.randn(1, 16, 2, 2)
    yield "vae", lambda dtype: decoder.to(dtype)(latents.to(dtype))


@pytest.mark.slow
def test_a_layer_of_real_width_is_nearly_the_same_in_bf16() -> None:
    """What bf16 rounds is noise of 0.4 % of a number; a layer, or all of the VAE, makes at most 2 % of it."""
    torch.manual_seed(0)
    with torch.no_grad():
        for part, answer in layers_of_real_width():
            exact, near = answer(torch.float32), answer(torch.bfloat16).float()
            error = float((near - exact).norm() / exact.norm())
            assert 0 < error < 0.02, part
