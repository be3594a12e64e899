"""The names that checkpoints and LoRAs have for the weights of a Z-Image transformer, translated to DiffSynth's.

The original code, ComfyUI and diffusers name the same weights differently, and the first two keep query, key and value
of an attention in one. The text encoder has transformers' names, or llama.cpp's. Works on names and shapes alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from core.messages import Message
from core.sizes import WeightsKind

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Size:
    """The numbers that a Z-Image transformer's shapes follow from; the names are ZImageDiT's own."""

    title: Message
    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    cap_feat_dim: int


# tests/hub/test_naming.py compares it with DiffSynth's class, built with its defaults and for the miniature.
LAYER_SIZES: Mapping[WeightsKind, Size] = {
    "full": Size(
        Message("z_image", "Z-Image"), dim=3840, n_layers=30, n_refiner_layers=2, n_heads=30, cap_feat_dim=2560
    ),
    "mini": Size(
        Message("miniature", "the embedded miniature"),
        dim=192,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=6,
        cap_feat_dim=128,
    ),
}

PATCH_NUMBERS = 64  # 2 x 2 latents of 16 channels
TIME_WIDTH, TIME_HIDDEN, FREQUENCIES = 256, 1024, 256  # of ZImageDiT's timestep embedder


@cache
def weight_shapes(size: WeightsKind) -> Mapping[str, Shape]:
    """Return the shape of the weight of every module that has one, by the module's name in ZImageDiT."""
    of = LAYER_SIZES[size]
    dim, time = of.dim, min(of.dim, TIME_WIDTH)
    shapes: dict[str, Shape] = {
        "all_x_embedder.2-1": (dim, PATCH_NUMBERS),
        "all_final_layer.2-1.linear": (PATCH_NUMBERS, dim),
        "all_final_layer.2-1.adaLN_modulation.1": (dim, time),
        "t_embedder.mlp.0": (TIME_HIDDEN, FREQUENCIES),
        "t_embedder.mlp.2": (time, TIME_HIDDEN),
        "cap_embedder.0": (of.cap_feat_dim,),
        "cap_embedder.1": (dim, of.cap_feat_dim),
    }
    for stack, count in (
        ("noise_refiner", of.n_refiner_layers),
        ("context_refiner", of.n_refiner_layers),
        ("layers", of.n_layers),
    ):
        for block in (f"{stack}.{index}" for index in range(count)):
            shapes |= {f"{block}.attention.{name}": (dim, dim) for name in ("to_q", "to_k", "to_v", "to_out.0")}
            shapes |= {f"{block}.attention.{name}": (dim // of.n_heads,) for name in ("norm_q", "norm_k")}
            hidden = int(dim / 3 * 8)
            shapes |= {f"{block}.feed_forward.{name}": (hidden, dim) for name in ("w1", "w3")}
            shapes[f"{block}.feed_forward.w2"] = (dim, hidden)
            shapes |= {
                f"{block}.{name}": (dim,) for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
            }
            if stack != "context_refiner":
                shapes[f"{block}.adaLN_modulation.0"] = (4 * dim, time)
    return shapes


# The ends of names that the original code, ComfyUI and some trainers write -> ours.
_ALIASES = {
    ".attention.to_out.0": (".attention.to_out", ".attention.out", ".attention.out.0", ".attention.wo"),
    ".attention.to_q": (".attention.to.q", ".attention.wq"),
    ".attention.to_k": (".attention.to.k", ".attention.wk"),
    ".attention.to_v": (".attention.to.v", ".attention.wv"),
    ".attention.norm_q": (".attention.q_norm",),
    ".attention.norm_k": (".attention.k_norm",),
}
_FUSED = (".attention.qkv", ".attention.to_qkv", ".attention.to.qkv")


@cache
def spellings(size: WeightsKind) -> Mapping[str, tuple[str, ...]]:
    """Return every spelling of a module's name, dots written as underscores, with the modules that it stands for."""
    found: dict[str, tuple[str, ...]] = {}
    for name in weight_shapes(size):
        others = [
            name,
            name.replace("all_x_embedder.2-1", "x_embedder"),
            name.replace("all_final_layer.2-1", "final_layer"),
        ]
        for end, aliases in _ALIASES.items():
            if name.endswith(end):
                others += [name.removesuffix(end) + alias for alias in aliases]
        found |= {flat(other): (name,) for other in others}
        if name.endswith(".attention.to_q"):
            block = name.removesuffix(".attention.to_q")
            three = tuple(f"{block}.attention.to_{letter}" for letter in "qkv")
            found |= {flat(block + fused): three for fused in _FUSED}
    return found


def flat(name: str) -> str:
    return name.replace(".", "_")


# --- whole checkpoints -------------------------------------------------------------------------------------------

PAD_TOKENS = ("x_pad_token", "cap_pad_token")
# Ends of the modules that have a bias beside their weight.
_BIASED = ("x_embedder.2-1", ".linear", "adaLN_modulation.0", "adaLN_modulation.1", "mlp.0", "mlp.2", "cap_embedder.1")
_LANDMARK = "cap_embedder.1.weight"  # called so in every spelling; what stands before it is the file's prefix


@cache
def tensor_shapes(size: WeightsKind) -> Mapping[str, Shape]:
    """Return the shape of every tensor of ZImageDiT, by its name there."""
    shapes: dict[str, Shape] = {}
    for module, shape in weight_shapes(size).items():
        shapes[f"{module}.weight"] = shape
        if module.endswith(_BIASED):
            shapes[f"{module}.bias"] = shape[:1]
    return shapes | dict.fromkeys(PAD_TOKENS, (1, LAYER_SIZES[size].dim))


@dataclass(frozen=True)
class Layout:
    """How a checkpoint spells a whole model.

    Attributes:
        size: which transformer, or text encoder, it is.
        own: the shape of every tensor, by its name in DiffSynth.
        sources: by the name of each tensor of the file that is used, those of DiffSynth that its rows are, in order.
    """

    size: WeightsKind
    own: Mapping[str, Shape]
    sources: Mapping[str, tuple[str, ...]]


def layout_of(shapes: Mapping[str, Shape]) -> Layout | None:
    """Return how a file spells a transformer's tensors; None where they are not all there, each in its shape.

    Whatever stands before all names is taken off. Other tensors of the file, such as an autoencoder's, are left alone.

    Args:
        shapes: of the file's tensors, by name.
    """
    landmarks = [name for name in shapes if name.endswith(_LANDMARK)]
    if len(landmarks) != 1:
        return None
    prefix = landmarks[0].removesuffix(_LANDMARK)
    size = next((size for size in LAYER_SIZES if shapes[landmarks[0]] == tensor_shapes(size)[_LANDMARK]), None)
    if size is None:
        return None
    targets = {name: _targets(name.removeprefix(prefix), size) for name in shapes if name.startswith(prefix)}
    return _whole(shapes, size, tensor_shapes(size), targets)


def _whole(
    shapes: Mapping[str, Shape], size: WeightsKind, own: Mapping[str, Shape], targets: Mapping[str, tuple[str, ...]]
) -> Layout | None:
    """Return a layout, given what each tensor of a file may be; None where not every tensor is there exactly once."""
    sources = {
        name: of
        for name, of in targets.items()
        if of and same_shape(shapes[name], (sum(own[target][0] for target in of), *own[of[0]][1:]))
    }
    found = [target for of in sources.values() for target in of]
    return Layout(size, own, sources) if sorted(found) == sorted(own) else None


def same_shape(found: Shape, wanted: Shape) -> bool:
    """Whether two shapes are the same but for sides of length 1 in front, which GGUF files leave out."""
    longest = max(len(found), len(wanted))
    return (1,) * (longest - len(found)) + found == (1,) * (longest - len(wanted)) + wanted


def _targets(name: str, size: WeightsKind) -> tuple[str, ...]:
    """Return the tensors of ZImageDiT that one of a file is, its prefix taken off."""
    if name in PAD_TOKENS:
        return (name,)
    module, _, kind = name.rpartition(".")
    targets = tuple(f"{target}.{kind}" for target in spellings(size).get(flat(module), ()))
    return targets if all(target in tensor_shapes(size) for target in targets) else ()


# --- text encoders -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncoderSize:
    """The numbers that a Qwen3's shapes follow from; the names are transformers' own (Qwen3Config)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


# tests/hub/test_naming.py compares it with DiffSynth's class and the miniature's configuration.
ENCODER_SIZES: Mapping[WeightsKind, EncoderSize] = {
    "full": EncoderSize(151_936, 2560, 9728, 36, 32, 8, 128),  # Qwen/Qwen3-4B, config.json
    "mini": EncoderSize(3072, 128, 384, 4, 4, 2, 32),
}

_LLAMA_CPP = {  # gguf-py, tensor_mapping.py and constants.py, MODEL_ARCH.QWEN3
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE_LAYERS = {"embed_tokens": "token_embd", "norm": "output_norm"}


@cache
def encoder_shapes(size: WeightsKind) -> Mapping[str, Shape]:
    """Return the shape of every tensor of a text encoder, by its name in transformers and DiffSynth."""
    of = ENCODER_SIZES[size]
    hidden, queries, keys = of.hidden_size, of.num_attention_heads * of.head_dim, of.num_key_value_heads * of.head_dim
    layer: dict[str, Shape] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (of.head_dim,),
        "self_attn.k_norm": (of.head_dim,),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (of.intermediate_size, hidden),
        "mlp.up_proj": (of.intermediate_size, hidden),
        "mlp.down_proj": (hidden, of.intermediate_size),
    }
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (of.vocab_size, hidden), "model.norm.weight": (hidden,)}
    for index in range(of.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


@cache
def _encoder_spellings(size: WeightsKind) -> Mapping[str, str]:
    """Return every spelling of a text encoder's tensors, without what may stand before, with the tensor it is."""
    found = {name.removeprefix("model."): name for name in encoder_shapes(size)}
    found |= {f"{theirs}.weight": f"model.{ours}.weight" for ours, theirs in _OUTSIDE_LAYERS.items()}
    for index in range(ENCODER_SIZES[size].num_hidden_layers):
        for ours, theirs in _LLAMA_CPP.items():
            found[f"blk.{index}.{theirs}.weight"] = f"model.layers.{index}.{ours}.weight"
    return found


def encoder_layout_of(shapes: Mapping[str, Shape]) -> Layout | None:
    """Return how a file spells a text encoder's tensors, as `layout_of` does for a transformer's."""
    for landmark in ("embed_tokens.weight", "token_embd.weight"):
        for first in (name for name in shapes if name.endswith(landmark)):
            for size in ENCODER_SIZES:
                own, known = encoder_shapes(size), _encoder_spellings(size)
                prefix = first.removesuffix(landmark)
                names = [name for name in shapes if name.startswith(prefix)]
                spelled = {name: known.get(name.removeprefix(prefix)) for name in names}
                targets = {name: (target,) for name, target in spelled.items() if target}
                if layout := _whole(shapes, size, own, targets):
                    return layout
    return None
