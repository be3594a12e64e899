"""Which architecture a file of weights looks made for, by the names and shapes of its tensors.

It explains why a file is refused: a guess by names that the public layouts of other models have, and Z-Image's has not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from core.messages import Message

# In this order: the first whose pattern is found in a tensor's name. From the public layouts of the models.
_ARCHITECTURES: Sequence[tuple[str, str]] = (
    ("Stable Diffusion XL", r"lora_te2_|te2_text_model|conditioner\.embedders"),
    ("Qwen-Image", r"transformer_blocks[._]\d+[._](img_mlp|txt_mlp|img_mod|txt_mod)[._]"),
    ("Chroma", r"distilled_guidance_layer"),
    ("FLUX.2", r"double_stream_modulation|single_transformer_blocks[._]\d+[._]attn[._]to_qkv_mlp_proj"),
    ("HunyuanVideo", r"double_blocks[._]\d+[._](img|txt)_attn_(qkv|proj)|individual_token_refiner"),
    ("FLUX", r"double_blocks[._]\d|single_blocks[._]\d|single_transformer_blocks[._]\d"),
    ("HiDream", r"double_stream_blocks|single_stream_blocks"),
    (
        "Stable Diffusion 3",
        r"joint_blocks[._]\d|joint_transformer_blocks|transformer_blocks[._]\d+[._]attn[._]add_q_proj",
    ),
    ("Wan", r"blocks[._]\d+[._](self_attn|cross_attn)[._][qkvo]\b|blocks[._]\d+[._](self_attn|cross_attn)_[qkvo]"),
    ("Stable Diffusion XL", r"(down_blocks[._]\d[._]attentions[._]\d[._]transformer_blocks[._][1-9])"),
    ("Stable Diffusion", r"(down|up|mid|input|output|middle)_blocks?[._]"),
    ("LTX-Video or PixArt", r"transformer_blocks[._]\d+[._]attn[12][._]to_"),
    ("Z-Image-Omni", r"siglip_(embedder|refiner)"),
    (
        "a language model",
        r"layers[._]\d+[._](self_attn|mlp)[._](q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    ),
)
LUMINA_WIDTH = 2304  # Lumina Image 2.0 has the same module names as Z-Image
XL_CONTEXT = 2048  # SDXL's cross attention reads this many numbers, SD 1 768 and SD 2 1024
_CLAIMS = ("ss_base_model_version", "modelspec.architecture")


def by_names(shapes: Mapping[str, tuple[int, ...]]) -> Message | None:
    """Return the architecture that the tensors' names belong to, None where they tell nothing."""
    joined = "\n".join(shapes)
    for title, pattern in _ARCHITECTURES:
        if re.search(pattern, joined):
            wide = any(XL_CONTEXT in shape and re.search(r"attn2[._]to_[kv]", name) for name, shape in shapes.items())
            return Message("architecture", "Stable Diffusion XL" if title == "Stable Diffusion" and wide else title)
    return None


def by_width(shapes: Mapping[str, tuple[int, ...]]) -> Message | None:
    """Return an architecture whose modules are named like Z-Image's, by its width."""
    if any(LUMINA_WIDTH in shape for shape in shapes.values()):
        return Message("architecture", "Lumina Image 2.0")
    return None


def claimed(metadata: Mapping[str, str]) -> str | None:
    """Return what a trainer's metadata says it is for, None where it says nothing or Z-Image."""
    claim = " ".join(metadata[key] for key in _CLAIMS if key in metadata)
    return claim if claim and not re.search("z[-_ ]?image", claim.lower()) else None
