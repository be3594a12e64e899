"""What a layer computes with a file: held against sums that the test makes itself, by copies and by hooks."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

import lora.file
from core.errors import RequestError
from diffusion.pipeline import Pipeline
from lora.adapter import Adapter, Adapters, applied
from tests.helpers import loras
from tests.helpers.loras import write

Q, QKV, W2 = "layers.0.attention.to_q", "layers.0.attention.qkv", "layers.1.feed_forward.w2"
NORM = "layers.2.attention_norm1"
COPIES, HOOKS = 1 << 30, 0
BOTH = pytest.mark.parametrize("room", [COPIES, HOOKS], ids=["copies", "hooks"])
STRENGTHS = pytest.mark.parametrize("strength", [1.0, 0.7, -0.5])


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) / math.sqrt(shape[-1])


def parsed(path: Path) -> Adapter:
    return Adapters().get(lora.file.read(path))


def own(pipeline: Pipeline, module: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the weight and the bias of a module of Turbo's."""
    found = dict(pipeline.transformers["turbo"].get_submodule(module).named_parameters())
    bias = found.get("bias")
    return found["weight"].detach().clone(), None if bias is None else bias.detach().clone()


def computed(
    pipeline: Pipeline, style: Adapter, strength: float, room: int, module: str, x: torch.Tensor
) -> torch.Tensor:
    """Return what a module makes of an input with a LoRA."""
    transformer = pipeline.transformers["turbo"]
    with torch.no_grad(), applied(transformer, style, strength, room, torch.float32):
        made: torch.Tensor = transformer.get_submodule(module)(x)
        return made.clone()


def check(
    pipeline: Pipeline,
    path: Path,
    changes: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
    room: int,
    strength: float,
    biases: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Hold what modules compute against weight + strength x (the changed weight - weight), and the bias likewise."""
    style = parsed(path)
    for module, change in changes.items():
        weight, bias = own(pipeline, module)
        x = noise(5, weight.shape[1], seed=9) * 3
        whole = weight + strength * (change(weight) - weight)
        expected = x @ whole.T
        expected += 0 if bias is None else bias
        expected += strength * (biases or {}).get(module, torch.zeros(()))
        made = computed(pipeline, style, strength, room, module, x)
        torch.testing.assert_close(made, expected, atol=2e-5, rtol=2e-5)


def under(module: str, **parts: torch.Tensor) -> loras.Tensors:
    """Return tensors by their names under a module; two underscores stand for a dot."""
    return {f"{module}.{part.replace('__', '.')}": values for part, values in parts.items()}


A, B, WIDE_B = noise(4, 192), noise(192, 4), noise(576, 4)
PAIR, PRODUCT = under(Q, lora_A__weight=A, lora_B__weight=B), B @ A
FUSED, FUSED_PRODUCT = under(QKV, lora_A__weight=A, lora_B__weight=WIDE_B), (WIDE_B @ A)[:192]
W1_A, W1_B, W2_A, W2_B = noise(192, 3, seed=1), noise(3, 192, seed=1), noise(192, 3, seed=2), noise(3, 192, seed=2)
HADA = under(Q, hada_w1_a=W1_A, hada_w1_b=W1_B, hada_w2_a=W2_A, hada_w2_b=W2_B)
PRODUCTS = (W1_A @ W1_B) * (W2_A @ W2_B)
LOKR, KRON = under(Q, lokr_w1=noise(4, 8), lokr_w2=noise(48, 24)), torch.kron(noise(4, 8), noise(48, 24))
DIFF, BIAS = noise(192, 192, seed=1), noise(192, seed=2)
ROWS, COLUMNS = noise(192, 1, seed=3) + 2, noise(1, 192, seed=3) + 2


def by_rows(weight: torch.Tensor) -> torch.Tensor:
    return ROWS * torch.nn.functional.normalize(weight, dim=1)


def by_columns(weight: torch.Tensor) -> torch.Tensor:
    return COLUMNS * torch.nn.functional.normalize(weight, dim=0)


SEVERAL: dict[str, tuple[loras.Tensors, Callable[[torch.Tensor], torch.Tensor], torch.Tensor | None]] = {
    "diff": (PAIR | under(Q, diff=DIFF), lambda w: w + PRODUCT + DIFF, None),
    "bias": (PAIR | under(Q, diff_b=BIAS), lambda w: w + PRODUCT, BIAS),
    "diff, bias and alpha": (
        PAIR | under(Q, diff=DIFF, diff_b=BIAS, alpha=torch.tensor(2.0)),
        lambda w: w + PRODUCT / 2 + DIFF,
        BIAS,
    ),
    "two biases": (PAIR | under(Q, lora_B__bias=BIAS, diff_b=BIAS), lambda w: w + PRODUCT, 2 * BIAS),
    "LoKr": (PAIR | LOKR, lambda w: w + PRODUCT + KRON, None),
    "four kinds": (PAIR | LOKR | HADA | under(Q, diff=DIFF), lambda w: w + PRODUCT + KRON + PRODUCTS + DIFF, None),
    "LoHa and alpha": (
        PAIR | HADA | under(Q, alpha=torch.tensor(6.0)),
        lambda w: w + 1.5 * PRODUCT + 2 * PRODUCTS,
        None,
    ),
    "DoRA": (PAIR | under(Q, dora_scale=ROWS, diff=DIFF), lambda w: by_rows(w + PRODUCT) + DIFF, None),
    "DoRA by column": (PAIR | under(Q, dora_scale=COLUMNS, diff=DIFF), lambda w: by_columns(w + PRODUCT) + DIFF, None),
    "two prefixes": (
        under(f"a.{Q}", diff=DIFF) | PAIR | under(Q, dora_scale=COLUMNS),
        lambda w: by_columns(w + PRODUCT) + DIFF,
        None,
    ),
    "fused and diff": (FUSED | under(Q, diff=DIFF, diff_b=BIAS), lambda w: w + FUSED_PRODUCT + DIFF, BIAS),
    "fused and LoKr": (FUSED | LOKR, lambda w: w + FUSED_PRODUCT + KRON, None),
}


@BOTH
@STRENGTHS
@pytest.mark.parametrize("case", SEVERAL)
def test_all_that_a_layer_has_is_applied(
    pipeline: Pipeline, case: str, room: int, strength: float, tmp_path: Path
) -> None:
    tensors, change, bias = SEVERAL[case]
    path = write(tmp_path / "a.safetensors", tensors)
    check(pipeline, path, {Q: change}, room, strength, {} if bias is None else {Q: bias})
    assert lora.file.read(path).report.repeats == ()


@BOTH
@pytest.mark.parametrize("part", ["diff", "w_norm"])
def test_a_norm_beside_pairs_is_applied(pipeline: Pipeline, part: str, room: int, tmp_path: Path) -> None:
    change = noise(192, seed=7)
    style = parsed(write(tmp_path / "a.safetensors", PAIR | {f"{NORM}.{part}": change}))
    x = noise(5, 192)
    weight, _ = own(pipeline, NORM)
    eps = pipeline.transformers["turbo"].get_submodule(NORM).eps
    assert isinstance(eps, float)
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight + 0.5 * change)
    torch.testing.assert_close(computed(pipeline, style, 0.5, room, NORM, x), expected, atol=1e-5, rtol=1e-5)
    check(pipeline, tmp_path / "a.safetensors", {Q: lambda w: w + PRODUCT}, room, 0.5)


def test_magnitudes_of_one_of_two_kinds_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", PAIR | LOKR | {f"{Q}.dora_scale": ROWS})
    with pytest.raises(
        RequestError, match=r"'layers\.0\.attention\.to_q\.dora_scale' may belong to either of two kinds"
    ):
        lora.file.read(path)


# --- numbers ---


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_an_alpha_may_be_any_number(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    for value in (2.0, 6.0) + ((-1.5, 0.25) if dtype.is_floating_point else ()):
        alpha = torch.full(shape, value).to(dtype)
        (layer,) = lora.file.read(write(tmp_path / "a.safetensors", PAIR | {f"{Q}.alpha": alpha})).layers
        assert (layer.alpha, layer.scale) == (value, value / 4)


def test_every_byte_is_the_number_that_torch_reads() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
    for byte, number in enumerate(numbers):
        assert lora.file._e4m3(byte) == number or (math.isnan(number) and math.isnan(lora.file._e4m3(byte)))


def packed(values: torch.Tensor, dtype: torch.dtype, each_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a tensor in few bits, and the scale that makes it itself again."""
    top = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = (values.abs().amax(1, keepdim=True) if each_row else values.abs().max()) / top
    return (values / scale).round().to(dtype) if dtype == torch.int8 else (values / scale).to(dtype), scale


@BOTH
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
@pytest.mark.parametrize("each_row", [False, True], ids=["one scale", "a scale a row"])
@pytest.mark.parametrize("end", ["{pair}.scale_weight", "{pair}.weight_scale", "{pair}.weight_scale_inv"])
def test_scaled_numbers_are_what_they_stand_for(
    pipeline: Pipeline, dtype: torch.dtype, each_row: bool, end: str, room: int, tmp_path: Path
) -> None:
    tensors: loras.Tensors = {}
    whole: loras.Tensors = {}
    for side, values in (("A", 0.01 * noise(4, 192)), ("B", noise(192, 4))):
        few, scale = packed(values, dtype, each_row)
        tensors |= {f"{Q}.lora_{side}.weight": few, f"{Q}.{end.format(pair=f'lora_{side}')}": scale}
        whole[side] = few.float() * scale
    path = write(tmp_path / "a.safetensors", tensors)
    check(pipeline, path, {Q: lambda w: w + whole["B"] @ whole["A"]}, room, 1.0)


@BOTH
@pytest.mark.parametrize("end", ["", ".default"])
def test_lokr_with_a_scalar_and_an_adapters_name(pipeline: Pipeline, end: str, room: int, tmp_path: Path) -> None:
    w1, w2_a, w2_b = noise(4, 8), noise(48, 2), noise(2, 24)
    parts = {"lokr_w1": w1, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "alpha": torch.ones(()), "scalar": torch.tensor(0.3)}
    tensors = {f"lycoris_layers_0_attention_to_q.{part}{end}": values for part, values in parts.items()}
    path = write(tmp_path / "a.safetensors", tensors)
    check(pipeline, path, {Q: lambda w: w + 0.3 * 0.5 * torch.kron(w1, w2_a @ w2_b)}, room, 1.0)


# --- zeros ---


@BOTH
@pytest.mark.parametrize("peft_names", [False, True])
def test_a_dora_that_has_learnt_nothing_changes_nothing(
    pipeline: Pipeline, peft_names: bool, room: int, tmp_path: Path
) -> None:
    """The pair's second matrix starts as zeros: the product is none, and the magnitudes are the weight's own."""
    weight, _ = own(pipeline, Q)
    norms = weight.norm(dim=1)
    name = f"{Q}.lora_magnitude_vector" if peft_names else f"{Q}.dora_scale"
    zero = PAIR | {f"{Q}.lora_B.weight": torch.zeros(192, 4), name: norms if peft_names else norms[:, None]}
    check(pipeline, write(tmp_path / "a.safetensors", zero), {Q: lambda w: w}, room, 1.0)


@BOTH
@STRENGTHS
@pytest.mark.parametrize("shape", [(192, 1), (1, 192)], ids=["rows", "columns"])
def test_rows_and_magnitudes_of_zeros_give_zeros(
    pipeline: Pipeline, shape: tuple[int, int], strength: float, room: int, tmp_path: Path
) -> None:
    weight, _ = own(pipeline, Q)
    magnitudes = torch.full(shape, 100.0)
    magnitudes[0, 0] = 0
    # A product that takes a row and a column of the weight away, which have no direction then.
    row = {f"{Q}.lora_A.weight": weight[3:4], f"{Q}.lora_B.weight": -torch.eye(192)[:, 3:4]}
    column = {f"{Q}.lora_A.weight": torch.eye(192)[3:4], f"{Q}.lora_B.weight": -weight[:, 3:4]}
    tensors = row if shape[1] == 1 else column
    product = tensors[f"{Q}.lora_B.weight"] @ tensors[f"{Q}.lora_A.weight"]

    def change(weight: torch.Tensor) -> torch.Tensor:
        whole = weight + product
        norms = whole.norm(dim=1 if shape[1] == 1 else 0, keepdim=True)
        return torch.where(norms > 0, magnitudes * whole / torch.where(norms > 0, norms, 1.0), 0.0)

    path = write(tmp_path / "a.safetensors", tensors | {f"{Q}.dora_scale": magnitudes})
    check(pipeline, path, {Q: change}, room, strength)


def test_zeros_in_some_layers_are_no_reason_to_refuse(pipeline: Pipeline, tmp_path: Path) -> None:
    zero = {f"{W2}.lora_A.weight": noise(4, 512), f"{W2}.lora_B.weight": torch.zeros(192, 4)}
    path = write(tmp_path / "a.safetensors", PAIR | zero)
    check(pipeline, path, {Q: lambda w: w + PRODUCT, W2: lambda w: w}, COPIES, 1.0)


def test_a_dora_of_zeros_alone_is_refused(tmp_path: Path) -> None:
    zeros = {name: torch.zeros_like(one) for name, one in (PAIR | {f"{Q}.dora_scale": ROWS}).items()}
    with pytest.raises(RequestError, match="every weight of this one is zero"):
        parsed(write(tmp_path / "a.safetensors", zeros))
