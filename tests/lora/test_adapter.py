"""A LoRA on the transformer: every dialect does the same, strength is linear, and nothing of it stays behind."""

import hashlib
import math
import random
import warnings
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypedDict

import pytest
import torch
from diffsynth.core import enable_vram_management
from diffsynth.core.quant import QuantizeConfig
from diffsynth.core.quant.base import QuantBackend, register_quant_backend
from diffsynth.core.quant.config import register_quant_method
from torch.utils.flop_counter import FlopCounterMode

import lora.file
from core.errors import RequestError
from core.events import Step
from core.request import Model
from diffusion.pipeline import Picture, Pipeline
from hub import inventory
from hub.parts import MINI_ROOT
from lora import adapter
from lora.adapter import Adapter, Adapters, applied
from tests.helpers import loras
from tests.helpers.loras import random_pairs, write
from tests.helpers.plans import everything_stays

PAIRS = random_pairs()
COPIES, HOOKS = 1 << 30, 0  # room for changed copies of every weight, and none


class Asked(TypedDict):
    """What every drawing has in common."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    seed: int


ASKED: Asked = {
    "prompt": "a large fox on a black background",
    "negative_prompt": "",
    "width": 128,
    "height": 128,
    "seed": 7,
}

# Largest difference of a latent, where latents have a deviation of about 1, over two steps: fp32 rounding came to 1e-5.
AGREEMENT = 2e-4


def parsed(path: Path) -> Adapter:
    return Adapters().get(lora.file.read(path))


@pytest.fixture
def style(tmp_path: Path) -> Adapter:
    return parsed(write(tmp_path / "style.safetensors", loras.peft(PAIRS)))


def latents(
    pipeline: Pipeline, style: Adapter | None = None, strength: float = 1.0, room: int = COPIES, steps: int = 2
) -> torch.Tensor:
    """Draw with Turbo, and return the latents."""
    pipeline.pipe.dit = pipeline.transformers["turbo"]
    pipeline.plan = everything_stays(lora_copies=room)
    drawing = pipeline.text_to_image(**ASKED, steps=steps, cfg=1.0)
    with nullcontext() if style is None else pipeline.lora(style, strength):
        while True:
            try:
                next(drawing)
            except StopIteration as done:
                picture: Picture = done.value
                return picture.latents


def digest(transformer: torch.nn.Module) -> str:
    """Return a digest over a transformer's weights."""
    found = hashlib.sha256()
    for name, tensor in transformer.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def hooks(transformer: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in transformer.modules())


# --- dialects ---


@pytest.mark.parametrize("room", [COPIES, HOOKS], ids=["copies", "hooks"])
def test_a_lora_does_what_its_products_say(pipeline: Pipeline, style: Adapter, room: int) -> None:
    """Held against weights that the test itself adds the products to."""
    drawn = latents(pipeline, style, 0.5, room)
    plain = latents(pipeline)
    assert (drawn - plain).abs().max() > 0.05
    transformer = pipeline.transformers["turbo"]
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    with torch.no_grad():
        for name, (down, up) in PAIRS.items():
            transformer.get_submodule(name).weight += 0.5 * (up @ down)
    expected = latents(pipeline)
    transformer.load_state_dict(before)
    torch.testing.assert_close(drawn, expected, atol=AGREEMENT, rtol=0)


@pytest.mark.parametrize("room", [COPIES, HOOKS], ids=["copies", "hooks"])
def test_every_spelling_of_names_gives_the_same_bits(
    pipeline: Pipeline, style: Adapter, room: int, tmp_path: Path
) -> None:
    expected = latents(pipeline, style, 0.8, room)
    for dialect, rewrite in loras.NAMES.items():
        other = parsed(write(tmp_path / "other.safetensors", rewrite(PAIRS)))
        assert torch.equal(latents(pipeline, other, 0.8, room), expected), dialect


@pytest.mark.parametrize("room", [COPIES, HOOKS], ids=["copies", "hooks"])
def test_every_other_form_gives_the_same_image(pipeline: Pipeline, style: Adapter, room: int, tmp_path: Path) -> None:
    own = pipeline.transformers["turbo"].state_dict()
    forms = {name: rewrite(PAIRS) for name, rewrite in loras.SUMS.items()}
    forms |= {
        "DoRA": loras.dora(PAIRS, own),
        "DoRA by column": loras.dora(PAIRS, own, by_column=True),
        "DoRA, PEFT's names": loras.dora(PAIRS, own, peft_names=True),
    }
    expected = latents(pipeline, style, 0.8, room)
    for form, tensors in forms.items():
        other = parsed(write(tmp_path / "other.safetensors", tensors))
        error = (latents(pipeline, other, 0.8, room) - expected).abs().max()
        print(f"{form}: {error:.1e}")
        assert error < AGREEMENT, form


def full_rank() -> dict[str, loras.Tensors]:
    """Return forms that are no plain LoRA in other words, each for one fused layer and one of its own."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    qkv, w2, norm, time = (
        "layers.0.attention.qkv",
        "layers.1.feed_forward.w2",
        "layers.2.attention.q_norm",
        "t_embedder.mlp.0",
    )
    hada_qkv = {
        f"{qkv}.hada_w{i}_{side}": noise(*shape) for i in (1, 2) for side, shape in (("a", (576, 3)), ("b", (3, 192)))
    }
    hada_w2 = {
        f"{w2}.hada_w{i}_{side}": noise(*shape) for i in (1, 2) for side, shape in (("a", (192, 20)), ("b", (20, 512)))
    }
    pairs = {
        f"{qkv}.lora_A.weight": noise(4, 192),
        f"{qkv}.lora_B.weight": noise(576, 4),
        f"{w2}.lora_A.weight": noise(4, 512),
        f"{w2}.lora_B.weight": noise(192, 4),
    }
    return {
        "LoKr": {
            f"{qkv}.lokr_w1": noise(8, 4),
            f"{qkv}.lokr_w2_a": noise(72, 2),
            f"{qkv}.lokr_w2_b": noise(2, 48),
            f"{w2}.lokr_w1_a": noise(4, 2),
            f"{w2}.lokr_w1_b": noise(2, 8),
            f"{w2}.lokr_w2": noise(48, 64),
            f"{w2}.alpha": torch.tensor(1.0),
        },
        "LoHa": {name: 2 * one for name, one in (hada_qkv | hada_w2).items()},
        "DoRA": {
            **pairs,
            f"{qkv}.dora_scale": noise(576, 1) + 3,
            f"{w2}.dora_scale": noise(192, 1) + 3,
            f"{time}.lora_A.weight": noise(4, 256),
            f"{time}.lora_B.weight": noise(1024, 4) / 9,
            f"{time}.lora_B.bias": noise(1024),
            f"{time}.dora_scale": torch.ones(1024, 1),
        },
        "DoRA by column": {
            **{name: one for name, one in pairs.items() if name.startswith(qkv)},
            f"{qkv}.dora_scale": noise(1, 192) + 1.7,
            f"{w2}.lokr_w1": noise(4, 8),
            f"{w2}.lokr_w2": noise(48, 64),
            f"{w2}.dora_scale": noise(1, 512) + 0.8,
        },
        "several kinds": {
            **pairs,
            f"{w2}.dora_scale": noise(1, 512) + 0.8,
            f"{w2}.diff": noise(192, 512) / 9,
            f"{w2}.diff_b": noise(192),
            "layers.0.attention.to_q.lokr_w1": noise(8, 4),
            "layers.0.attention.to_q.lokr_w2": noise(24, 48),
        },
        "differences": {
            f"{norm}.diff": noise(32),
            f"{w2}.diff": noise(192, 512) / 9,
            f"{w2}.diff_b": noise(192),
        },
    }


@pytest.mark.parametrize("form", full_rank())
@pytest.mark.parametrize("strength", [0.6, 1.5])
def test_hooks_and_copies_agree(pipeline: Pipeline, form: str, strength: float, tmp_path: Path) -> None:
    """Two ways that share no arithmetic but the norms: on the weights, and on what the layers compute."""
    other = parsed(write(tmp_path / "a.safetensors", full_rank()[form]))
    copied = latents(pipeline, other, strength, COPIES)
    change = (copied - latents(pipeline)).abs().max().item()
    assert change > 10 * AGREEMENT
    # beyond strength 1 such a LoRA may blow latents up to thousands, and rounding with them
    tolerance = AGREEMENT * max(1.0, copied.abs().max().item())
    torch.testing.assert_close(latents(pipeline, other, strength, HOOKS), copied, atol=tolerance, rtol=0)


@pytest.mark.parametrize("form", full_rank())
def test_strength_is_linear(form: str, tmp_path: Path) -> None:
    for change in parsed(write(tmp_path / "a.safetensors", full_rank()[form])).changes:
        parts = {part: values.float() for part, values in change.tensors.items()}
        shape = lora_shape(change.targets)
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        whole = adapter.changed(weight, change, parts, 1.0) - weight
        half = adapter.changed(weight, change, parts, 0.5) - weight
        torch.testing.assert_close(half, whole / 2, atol=1e-5, rtol=1e-5)
        assert torch.equal(adapter.changed(weight, change, parts, 0.0), weight)


def lora_shape(targets: tuple[str, ...]) -> tuple[int, ...]:
    from hub.naming import weight_shapes

    rows, *columns = weight_shapes("mini")[targets[0]]
    return (rows * len(targets), *columns)


def test_dora_and_lokr_and_loha_follow_their_definitions(tmp_path: Path) -> None:
    """The formulas of the papers, in the plainest terms."""
    forms = full_rank()
    weight = torch.randn(192, 512, generator=torch.Generator().manual_seed(3))
    name = "layers.1.feed_forward.w2"

    def result(form: str) -> torch.Tensor:
        (change,) = (
            change
            for change in parsed(write(tmp_path / "a.safetensors", forms[form])).changes
            if name in change.targets
        )
        return adapter.changed(weight, change, dict(change.tensors), 1.0)

    def part(form: str, end: str) -> torch.Tensor:
        return forms[form][f"{name}.{end}"]

    kron = torch.kron(part("LoKr", "lokr_w1_a") @ part("LoKr", "lokr_w1_b"), part("LoKr", "lokr_w2"))
    torch.testing.assert_close(result("LoKr"), weight + 0.5 * kron)
    first, second = (part("LoHa", f"hada_w{i}_a") @ part("LoHa", f"hada_w{i}_b") for i in (1, 2))
    torch.testing.assert_close(result("LoHa"), weight + first * second)
    whole = weight + part("DoRA", "lora_B.weight") @ part("DoRA", "lora_A.weight")
    rows = torch.stack([part("DoRA", "dora_scale")[i] * row / row.norm() for i, row in enumerate(whole)])
    torch.testing.assert_close(result("DoRA"), rows)
    whole = weight + torch.kron(part("DoRA by column", "lokr_w1"), part("DoRA by column", "lokr_w2"))
    columns = [part("DoRA by column", "dora_scale")[0, i] * column / column.norm() for i, column in enumerate(whole.T)]
    torch.testing.assert_close(result("DoRA by column"), torch.stack(columns).T)


# --- other implementations ---


@pytest.mark.parametrize("dialect", ["transformer", "diffusion_model", "kohya", "kohya, alpha", "default adapter"])
def test_latents_agree_with_diffusers(pipeline: Pipeline, dialect: str, tmp_path: Path) -> None:
    """`load_lora_weights` of diffusers on the same weights: no code shared with ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the imports alone
        import peft  # noqa: F401
        from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
        from diffusers import ZImagePipeline as DiffusersPipeline
    from transformers import AutoTokenizer, Qwen3Model

    path = write(tmp_path / "style.safetensors", loras.NAMES[dialect](PAIRS))
    turbo = MINI_ROOT / "Z-Image-Turbo"
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(turbo / "scheduler")  # type: ignore[no-untyped-call]  # diffusers leaves it untyped
    transformer = ZImageTransformer2DModel.from_pretrained(  # type: ignore[no-untyped-call]  # diffusers leaves it untyped
        turbo / "transformer", torch_dtype=torch.float32
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
    theirs.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="style")
    theirs.set_adapters("style", 0.8)
    expected = theirs(
        prompt=ASKED["prompt"],
        height=128,
        width=128,
        num_inference_steps=8,
        guidance_scale=0,
        latents=torch.randn((1, 16, 16, 16), generator=torch.Generator("cpu").manual_seed(7)),
        output_type="latent",
    ).images
    ours = latents(pipeline, parsed(path), 0.8, COPIES, steps=8)
    error = (ours - expected).abs().max()
    print(f"{dialect}: largest difference {error:.1e}")
    assert error < AGREEMENT
    assert (ours - latents(pipeline, steps=8)).abs().max() > 0.05


def test_dora_agrees_with_peft(pipeline: Pipeline, tmp_path: Path) -> None:
    """PEFT's own DoRA on one layer, with what it saves read as a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    linear = torch.nn.Linear(192, 192, bias=False)
    layer = torch.nn.Sequential(linear)
    original = linear.weight.detach().clone()
    model = get_peft_model(layer, LoraConfig(r=4, lora_alpha=4, target_modules=["0"], use_dora=True))
    for name, one in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(one, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    saved = {
        name.replace("model.0", "model.layers.0.attention.to_q"): one
        for name, one in get_peft_model_state_dict(model).items()
    }
    (change,) = parsed(write(tmp_path / "a.safetensors", saved)).changes
    x = torch.randn(5, 192)
    ours = x @ adapter.changed(original, change, dict(change.tensors), 1.0).T
    torch.testing.assert_close(ours, model(x), atol=1e-4, rtol=1e-4)


# --- kinds of pipelines ---


def reload(lora_copies: int = COPIES) -> Pipeline:
    built = Pipeline("cpu", torch.float32, everything_stays(lora_copies=lora_copies))
    models: tuple[Model, ...] = ("base", "turbo")
    for model in models:
        list(built.load(inventory.choose("mini", "generate", model), model))
    return built


def managed() -> Pipeline:
    """A pipeline whose transformers are under DiffSynth's VRAM management: held in bf16, computed in fp32."""
    from diffsynth.configs import VRAM_MANAGEMENT_MODULE_MAPS

    built = reload()
    config = {
        f"{when}_{what}": value
        for when in ("offload", "onload", "preparing")
        for what, value in (("dtype", torch.bfloat16), ("device", "cpu"))
    }
    config |= {"computation_dtype": torch.float32, "computation_device": "cpu"}
    maps = {
        resolve(source): resolve(target)
        for source, target in VRAM_MANAGEMENT_MODULE_MAPS["diffsynth.models.z_image_dit.ZImageDiT"].items()
    }
    for transformer in built.transformers.values():
        enable_vram_management(transformer, maps, vram_config=config)
        move(transformer, "onload")
    return built


def resolve(dotted: str) -> type:
    import importlib

    module, name = dotted.rsplit(".", 1)
    found: type = getattr(importlib.import_module(module), name)
    return found


def move(transformer: torch.nn.Module, where: str) -> None:
    """What DiffSynth's `load_models_to_device` does; itself it calls torch.cpu.empty_cache, which does not exist."""
    for module in transformer.modules():
        if hasattr(module, where):
            getattr(module, where)()


class Int8Linear(torch.nn.Linear):
    """A linear layer that holds its weight as int8 with a scale for each row, as quantization libraries do."""

    scale: torch.Tensor

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@register_quant_backend("test")
class Int8Backend(QuantBackend):  # type: ignore[misc]  # DiffSynth brings no types
    """A backend for DiffSynth's own quantization that needs no further package."""

    def create_quantized_linear(
        self, linear: torch.nn.Linear, compute_device: object = None, model_device: object = None
    ) -> Int8Linear:
        return Int8Linear(linear)

    def quantized_linear_classes(self) -> tuple[type[torch.nn.Linear], ...]:
        return (Int8Linear,)


def quantized() -> Pipeline:
    """A pipeline whose transformers hold their weights in int8."""
    register_quant_method("test_int8", "test", lambda _: None)
    built = reload()
    for transformer in built.transformers.values():
        QuantizeConfig(method="test_int8").quantize_model(transformer)
    return built


KINDS = {"plain": reload, "hooked": lambda: reload(HOOKS), "managed": managed, "quantized": quantized}


@pytest.fixture(scope="module", params=KINDS)
def any_pipeline(request: pytest.FixtureRequest) -> Pipeline:
    return KINDS[request.param]()


def test_a_lora_is_applied_to_every_kind_of_pipeline(any_pipeline: Pipeline, tmp_path: Path) -> None:
    """Held against a plain transformer that has the same weights: those that the kind computes with."""
    plain = reload()
    own = any_pipeline.transformers["turbo"]
    for name, module in plain.transformers["turbo"].named_modules():
        if isinstance(module, torch.nn.Linear):
            device, dtype = torch.device("cpu"), torch.float32
            theirs = adapter._module(own, name)
            assert isinstance(theirs, torch.nn.Linear)
            with torch.no_grad():
                module.weight.copy_(adapter._weight_of(theirs, device, dtype))
    room = any_pipeline.plan.lora_copies
    for form, tensors in {"LoRA": loras.peft(PAIRS), **full_rank()}.items():
        other = parsed(write(tmp_path / "a.safetensors", tensors))
        error = (latents(any_pipeline, other, 0.8, room) - latents(plain, other, 0.8)).abs().max()
        print(f"{form}: {error:.1e}")
        assert error < 2 * AGREEMENT, form


class _Shortage:
    """Runs out of memory in a layer of the transformer: a real shortage would take the machine with it."""

    def __init__(self, transformer: torch.nn.Module, calls: int) -> None:
        self.calls = calls
        self.hook = transformer.get_submodule("all_final_layer.2-1").register_forward_hook(self)

    def __call__(self, *_: object) -> None:
        self.calls -= 1
        if self.calls < 0:
            raise torch.OutOfMemoryError("as if")


@pytest.mark.slow
def test_nothing_stays_behind_over_random_sequences(any_pipeline: Pipeline, tmp_path: Path) -> None:
    """Done, cancelled, out of memory, a LoRA that breaks; Base and Turbo in turn; 50 sequences over the kinds."""
    files = {
        "LoRA": loras.peft(PAIRS),
        "everywhere": loras.kohya(random_pairs(3, modules=loras.linear_modules())),
    } | full_rank()
    adapters = [parsed(write(tmp_path / f"{index}.safetensors", one)) for index, one in enumerate(files.values())]
    room = any_pipeline.plan.lora_copies
    before: dict[str, str] = {model: digest(one) for model, one in any_pipeline.transformers.items()}
    counted = {model: hooks(one) for model, one in any_pipeline.transformers.items()}
    models: list[Model] = ["base", "turbo"]
    bare = {model: draw(any_pipeline, model) for model in models}
    chance = random.Random(8)
    for _ in range(13):
        for _ in range(chance.randint(1, 4)):
            model, end = chance.choice(models), chance.choice(["done", "cancelled", "shortage", "broken"])
            any_pipeline.plan = everything_stays(lora_copies=chance.choice([room, HOOKS]))
            draw(
                any_pipeline,
                model,
                chance.choice(adapters),
                chance.choice([0.0, 0.3, 0.8, 1.5]),
                end,
                chance.randint(0, 2),
            )
            assert {model: digest(one) for model, one in any_pipeline.transformers.items()} == before
            assert {model: hooks(one) for model, one in any_pipeline.transformers.items()} == counted
        model = chance.choice(models)
        assert draw(any_pipeline, model) == bare[model]
    any_pipeline.plan = everything_stays(lora_copies=room)


def draw(
    pipeline: Pipeline,
    model: Model,
    style: Adapter | None = None,
    strength: float = 0.0,
    end: str = "done",
    after: int = 0,
) -> bytes | None:
    """Draw two steps and return the image's bytes, or end it otherwise on the way."""
    pipeline.pipe.dit = transformer = pipeline.transformers[model]
    drawing = pipeline.text_to_image(**ASKED, steps=2, cfg=2.0 if model == "base" else 1.0)
    if end == "broken":  # the last layer is not there any more
        assert style is not None
        changes = (*style.changes, adapter.Change(("layers.9.attention.to_q",), "LoRA", 1.0, style.changes[0].tensors))
        broken = Adapter(style.report, style.identity, changes)
        with pytest.raises(AttributeError), pipeline.lora(broken, strength or 1.0):
            list(drawing)
        return None
    with nullcontext() if style is None else pipeline.lora(style, strength):
        if end == "shortage":
            short = _Shortage(transformer, after // 2)
            with pytest.raises(torch.OutOfMemoryError):
                list(drawing)
            short.hook.remove()
            return None
        while True:
            try:
                event = next(drawing)
            except StopIteration as done:
                picture: Picture = done.value
                return picture.image.tobytes()
            if end == "cancelled" and event in (Step(after, 2), Step(2, 2)):
                drawing.close()
                return None


def test_strength_zero_is_no_lora_at_all(pipeline: Pipeline, style: Adapter) -> None:
    assert torch.equal(latents(pipeline, style, 0.0), latents(pipeline))
    assert torch.equal(latents(pipeline, style, 0.0, HOOKS), latents(pipeline))


def test_copies_are_made_only_where_all_of_them_fit(pipeline: Pipeline, style: Adapter) -> None:
    transformer = pipeline.transformers["turbo"]
    needed = sum(transformer.get_submodule(name).weight.nbytes for name in PAIRS)
    own = transformer.layers[0].attention.to_q.weight
    with applied(transformer, style, 1.0, needed, torch.float32):
        assert hooks(transformer) == 0
        assert transformer.layers[0].attention.to_q.weight is not own
    with applied(transformer, style, 1.0, needed - 1, torch.float32):
        assert hooks(transformer) == len(PAIRS)
        assert transformer.layers[0].attention.to_q.weight is own
    assert transformer.layers[0].attention.to_q.weight is own


def test_the_same_lora_again_costs_what_none_costs(
    pipeline: Pipeline, style: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operations counted by torch, with everything computed; the rest of putting a LoRA on is a few assignments."""
    other = parsed(write(tmp_path / "other.safetensors", loras.peft(random_pairs(7))))
    transformer = pipeline.transformers["turbo"]

    def drawn(chosen: Adapter | None, strength: float = 1.0) -> tuple[torch.Tensor, int]:
        pipeline.denoiser._captions.clear()
        with FlopCounterMode(display=False) as counter:
            found = latents(pipeline, chosen, strength)
        return found, counter.get_total_flops()

    pipeline.lora_copies.forget()
    before = digest(transformer)
    latents(pipeline)  # encodes the prompt
    _, none = drawn(None)
    first, making = drawn(style)
    again, kept = drawn(style)
    assert none == kept < making
    assert torch.equal(first, again)
    # Whatever else is asked for is made again, and what was kept is let go.
    copies = [weakref.ref(values) for _, _, values in pipeline.lora_copies._copies]
    assert copies
    for chosen, strength in ((style, 0.5), (other, 1.0), (style, 1.0)):
        found, flops = drawn(chosen, strength)
        assert flops > none
        assert torch.equal(found, first) == ((chosen, strength) == (style, 1.0))
    assert not any(copy() is not None for copy in copies)
    assert digest(transformer) == before
    assert pipeline.lora_copies._copies
    latents(pipeline, style, 0.0)
    assert not pipeline.lora_copies._copies


# --- reading the numbers ---


def test_the_same_file_is_read_once_and_a_copy_of_it_only_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Adapters()
    path = write(tmp_path / "a.safetensors", loras.peft(PAIRS))
    first = kept.get(lora.file.read(path))
    calls: list[str] = []

    def count(name: str) -> None:
        real = getattr(lora.file, name)

        def counted(*values: Any) -> object:
            calls.append(name)
            return real(*values)

        monkeypatch.setattr(lora.file, name, counted)

    count("identify")
    monkeypatch.setattr(adapter, "_load", lambda *_: calls.append("load"))
    assert kept.get(lora.file.read(path)) is first
    assert calls == []
    copy = tmp_path / "b.safetensors"
    copy.write_bytes(path.read_bytes())
    assert kept.get(lora.file.read(copy)) is first
    assert calls == ["identify"]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    kept = Adapters()
    path = write(tmp_path / "a.safetensors", loras.peft(PAIRS))
    first = kept.get(lora.file.read(path))
    write(path, loras.peft(random_pairs(9)))
    second = kept.get(lora.file.read(path))
    assert second.identity != first.identity
    assert not torch.equal(second.changes[0].tensors["up"], first.changes[0].tensors["up"])


def test_what_is_kept_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "KEPT_FILES", 2)
    kept = Adapters()
    for seed in range(4):
        kept.get(lora.file.read(write(tmp_path / f"{seed}.safetensors", loras.peft(random_pairs(seed)))))
    assert len(kept._kept) == 2
    monkeypatch.setattr(adapter, "KEPT_BYTES", 1)
    kept = Adapters()
    for seed in range(2):
        kept.get(lora.file.read(tmp_path / f"{seed}.safetensors"))
    assert len(kept._kept) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_no_number_is_refused_by_name(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(dtype, copy=True) for name, tensor in loras.peft(PAIRS).items()}
    tensors["layers.3.feed_forward.w2.lora_B.weight"][5, 1] = value
    with pytest.raises(RequestError, match=r"'layers\.3\.feed_forward\.w2\.lora_B\.weight' holds NaN or infinity"):
        parsed(write(tmp_path / "a.safetensors", tensors))


@pytest.mark.parametrize("zero", ["lora_A", "lora_B", "alpha"])
def test_a_lora_that_would_change_nothing_is_refused(zero: str, tmp_path: Path) -> None:
    tensors = loras.kohya(PAIRS, alpha=0.5) if zero == "alpha" else loras.peft(PAIRS)
    tensors = {name: torch.zeros_like(one) if zero in name else one for name, one in tensors.items()}
    with pytest.raises(RequestError, match="a LoRA that changes something; every weight of this one is zero"):
        parsed(write(tmp_path / "a.safetensors", tensors))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64])
def test_numbers_of_any_float_are_read_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in loras.peft(PAIRS).items()}
    (change,) = (
        change
        for change in parsed(write(tmp_path / "a.safetensors", tensors)).changes
        if "layers.0.attention.to_q" in change.targets
    )
    assert torch.equal(change.tensors["up"].double(), tensors["layers.0.attention.to_q.lora_B.weight"].double())


def test_a_file_that_goes_away_is_refused(tmp_path: Path) -> None:
    file = lora.file.read(write(tmp_path / "a.safetensors", loras.peft(PAIRS)))
    file.path.unlink()
    with pytest.raises(RequestError, match="a file that can be read"):
        Adapters().get(file)


def test_numbers_outlive_their_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", loras.peft(PAIRS))
    other = parsed(path)
    path.write_bytes(b"")
    up = next(change for change in other.changes if change.targets == ("layers.0.attention.to_q",)).tensors["up"]
    assert torch.equal(up, PAIRS["layers.0.attention.to_q"][1])
