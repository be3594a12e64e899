"""The denoiser gives DiffSynth's numbers, bit by bit, and computes nothing twice."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffsynth.core.vram.layers import AutoWrappedLinear
from diffsynth.models.z_image_controlnet import ZImageControlNet
from diffsynth.models.z_image_dit import ZImageDiT
from diffsynth.pipelines.z_image import model_fn_z_image_turbo
from torch.utils._python_dispatch import TorchDispatchMode

import lora.file
import mini.config
from diffusion.denoiser import Denoiser
from diffusion.pipeline import Pipeline, follow_weight_dtype
from hub import inventory
from mini.models import MiniControlNet
from tests.helpers.plans import plan_with

STEP = torch.tensor([700.0])  # of 1000
SCALE = 0.8


def models(dtype: torch.dtype, wide: bool) -> Any:
    """A transformer and a ControlNet of random numbers, as a pipe has them."""
    torch.manual_seed(0)
    with torch.device("meta"):
        if wide:
            dit = ZImageDiT(n_layers=1, n_refiner_layers=1)
            net = ZImageControlNet(control_layers_places=(0,), n_refiner_layers=1)
        else:
            dit, net = ZImageDiT(**{**mini.config.TRANSFORMER_CONFIG, "n_refiner_layers": 2}), MiniControlNet()
    pipe = SimpleNamespace(dit=dit.to_empty(device="cpu").to(dtype), controlnet=net.to_empty(device="cpu").to(dtype))
    if not wide:
        refiners = net.control_noise_refiner
        refiners.append(type(refiners[0])(dim=192, n_heads=6, n_kv_heads=6, block_id=1).to(dtype))
    some = torch.randn(1_000_003)  # repeated, since making a billion takes a minute
    for values in (*pipe.dit.parameters(), *pipe.controlnet.parameters()):
        flat = values.data.view(-1)
        for start in range(0, len(flat), len(some)):
            flat[start : start + len(some)] = some[: len(flat) - start]
        values.data.mul_(1.0 if values.ndim == 1 else values.shape[-1] ** -0.5)
    follow_weight_dtype(pipe.dit.t_embedder)
    return pipe


@pytest.fixture(scope="module")
def small() -> Any:
    return models(torch.float32, wide=False)


def embedding(tokens: int, pipe: Any) -> torch.Tensor:
    linear = pipe.dit.cap_embedder[1]
    return torch.randn(tokens, linear.in_features).to(linear.weight.dtype)


def latents(pipe: Any, size: tuple[int, int], channels: int = 16) -> torch.Tensor:
    return torch.randn(1, channels, *size).to(pipe.dit.x_pad_token.dtype)


def theirs(pipe: Any, of: torch.Tensor, embeddings: Sequence[torch.Tensor], control: torch.Tensor | None) -> list[Any]:
    more = {} if control is None else {"control_context": control, "control_scale": SCALE}
    step = STEP.to(of.dtype)
    return [
        model_fn_z_image_turbo(pipe.dit, pipe.controlnet, of, step, [[each]], **more)  # one call for each prompt
        for each in embeddings
    ]


def ours(pipe: Any, of: torch.Tensor, embeddings: Sequence[torch.Tensor], control: torch.Tensor | None) -> list[Any]:
    denoiser = Denoiser(pipe)
    captions = [denoiser.caption(each) for each in embeddings]
    guide = None if control is None else denoiser.control(control, SCALE)
    return denoiser.predict(of, STEP.to(of.dtype), captions, guide)


def check(pipe: Any, size: tuple[int, int], tokens: Sequence[int], controlled: bool) -> None:
    of, embeddings = latents(pipe, size), [embedding(count, pipe) for count in tokens]
    control = latents(pipe, size, 33).unsqueeze(2) if controlled else None
    with torch.no_grad():
        expected, found = (predict(pipe, of, embeddings, control) for predict in (theirs, ours))
    assert len(found) == len(tokens)
    assert all(values.std() > 0.01 for values in found)
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("controlled", [False, True])
@pytest.mark.parametrize(
    ("size", "tokens"),
    [((16, 16), [20]), ((14, 18), [32, 5]), ((10, 16), [40, 7])],  # with and without padding; lengths alike, and not
)
def test_it_gives_diffsynths_bits(
    dtype: torch.dtype, controlled: bool, size: tuple[int, int], tokens: list[int]
) -> None:
    check(models(dtype, wide=False), size, tokens, controlled)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_real_width_give_diffsynths_bits(dtype: torch.dtype) -> None:
    check(models(dtype, wide=True), (10, 8), [20, 30], controlled=True)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts torch's operations by name."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.count: collections.Counter[str] = collections.Counter()
        with self, torch.no_grad():
            work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device_or_copies_all_layers(small: Any) -> None:
    """A mask as an index makes a card's queue run empty; stacking copies the ControlNet's states in each layer."""
    of, embeddings, control = latents(small, (14, 18)), [embedding(5, small)], latents(small, (14, 18), 33).unsqueeze(2)
    plain = Operations(lambda: theirs(small, of, embeddings, control)).count
    found = Operations(lambda: ours(small, of, embeddings, control)).count
    for name in ("index_put_", "stack", "unbind"):
        assert plain[name] > 0
    # what is left of stacking makes positions, once an image
    assert plain["stack"] - found["stack"] >= len(small.controlnet.control_layers)
    assert not {"index_put_", "nonzero", "unbind", "_local_scalar_dense", "item"} & {*found}


def calls(*modules: torch.nn.Module) -> tuple[collections.Counter[int], list[Any]]:
    """Count the calls of modules, by their place in the list, until the hooks are removed."""
    count: collections.Counter[int] = collections.Counter()
    hooks = [
        module.register_forward_hook(lambda *_, number=number: count.update([number]))
        for number, module in enumerate(modules)
    ]
    return count, hooks


def finish(drawing: Any) -> Any:
    while True:
        try:
            next(drawing)
        except StopIteration as done:
            return done.value


def guided(pipeline: Pipeline, unwanted: str) -> Any:
    return finish(
        pipeline.text_to_image(
            prompt="a fox", negative_prompt=unwanted, steps=3, cfg=4.0, width=128, height=128, seed=7
        )
    )


@pytest.mark.parametrize(("unwanted", "times"), [("a dog", 3), ("a small dog on a red background, " * 5, 6)])
def test_what_both_halves_of_a_step_share_is_computed_once(pipeline: Pipeline, unwanted: str, times: int) -> None:
    pipeline.pipe.dit = dit = pipeline.transformers["base"]
    count, hooks = calls(
        dit.cap_embedder, dit.context_refiner[-1], dit.all_x_embedder["2-1"], dit.t_embedder, dit.noise_refiner[0]
    )
    pipeline.denoiser._captions.clear()
    first = guided(pipeline, unwanted)
    # A prompt once an image; latents and time once a step, refined latents where both prompts are equally long.
    assert count == {0: 2, 1: 2, 2: 3, 3: 3, 4: times}
    again = guided(pipeline, unwanted)
    assert torch.equal(first.latents, again.latents)
    assert count == {0: 2, 1: 2, 2: 6, 3: 6, 4: 2 * times}  # refined prompts are kept
    for hook in hooks:
        hook.remove()


def test_refined_prompts_are_kept_for_a_transformer_with_its_lora(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, gold = pipeline.denoiser, pipeline.loras.get(lora.file.read(lora.file.find("gold")))
    refined: list[int] = []
    refine = denoiser.refined

    def counted(embedding: torch.Tensor) -> torch.Tensor:
        refined.append(1)
        return refine(embedding)

    monkeypatch.setattr(denoiser, "refined", counted)

    def caption(prompt: str = "a red fox") -> torch.Tensor:
        """What is kept is what would be computed now."""
        with torch.no_grad():
            embedding = pipeline.prompts.encode(prompt).embedding
            kept = denoiser.caption(embedding)
            assert torch.equal(kept, refine(embedding))
        return kept

    pipeline.pipe.dit = pipeline.transformers["turbo"]
    denoiser._captions.clear()
    plain = caption()
    for strength in (1.0, 0.5, 1.0):
        with pipeline.lora(gold, strength):
            caption()
        caption()
    assert len(refined) == 3  # without it, and for each strength
    pipeline.pipe.dit = pipeline.transformers["base"]
    assert not torch.equal(caption(), plain)
    assert len(refined) == 4
    assert denoiser._captions.currsize == sum(values.nbytes for pair in denoiser._captions.values() for values in pair)


def test_both_halves_of_a_step_take_weights_that_were_fetched_once(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = Pipeline("cpu", torch.float32, plan_with("host"), emulated=True)
    list(streamed.load(inventory.choose("mini", "generate", "base"), "base"))
    fetched: collections.Counter[Any] = collections.Counter()
    compute = AutoWrappedLinear.computation

    def watched(self: Any) -> Any:
        fetched.update([self])
        return compute(self)

    monkeypatch.setattr(AutoWrappedLinear, "computation", watched)
    pipeline.pipe.dit = pipeline.transformers["base"]
    assert torch.equal(guided(streamed, "a dog").latents, guided(pipeline, "a dog").latents)
    layers = [module for module in streamed.pipe.dit.layers.modules() if isinstance(module, AutoWrappedLinear)]
    assert len(layers) == 8 * mini.config.TRANSFORMER_CONFIG["n_layers"]
    assert {fetched[layer] for layer in layers} == {3}  # steps
    assert not any("computation" in vars(layer) for layer in layers)  # nothing stays behind
