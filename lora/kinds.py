"""Kinds of adapters that are not applied here, told by the names of their tensors: why such a file is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from core.messages import Message
from hub.naming import PATCH_NUMBERS, Shape

# The first whose pattern is found in a tensor's name. From what PEFT (each tuner's `prefix`), LyCORIS, kohya's trainers
# and ComfyUI write.
_KINDS: Sequence[tuple[str, str]] = (
    ("control LoRA", r"(?:^|\.)lora_controlnet$|\.(?:reshape_weight|set_weight)$"),
    ("BOFT", r"\.boft_[Rs](?:[._]|$)"),
    ("OFT", r"\.oft_(?:blocks|diag|[Rr])(?:[._]|$)"),
    ("GLoRA", r"\.glora_[A-E](?:[._]|$)|\.[ab][12]\.weight$"),
    ("IA3", r"\.ia3_l(?:[._]|$)|\.on_input$"),
    ("PVeRA", r"(?:^|\.)pvera_"),
    ("VeRA", r"(?:^|\.)vera_(?:lambda_[bd]|[AB])(?:[._]|$)"),
    ("AdaLoRA", r"\.lora_E(?:[._]|$)|\.ranknum(?:[._]|$)"),
    ("VB-LoRA", r"(?:^|\.)vblora_"),
    ("RandLoRA", r"(?:^|\.)randlora_"),
    ("GraLoRA", r"\.gralora_"),
    ("DeLoRA", r"\.delora_"),
    ("FourierFT", r"\.fourierft_"),
    ("WaveFT", r"\.waveft_"),
    ("HRA", r"\.hra_[uU](?:[._]|$)"),
    ("HiRA", r"\.hira_[AB](?:[._]|$)"),
    ("Bone or MiSS", r"\.(?:bone|miss)_"),
    ("C3A", r"\.c3a_"),
    ("RoAd", r"\.road_(?:theta|alpha)"),
    ("SHiRA", r"\.shira_"),
    ("OSF", r"\.osf_"),
    ("PSOFT", r"\.psoft_"),
    ("TinyLoRA", r"(?:^|\.)tinylora_"),
    ("UniLoRA", r"(?:^|\.)unilora_"),
    ("Lily", r"(?:^|\.)lily_"),
    ("Poly", r"\.poly_"),
    ("X-LoRA", r"(?:^|\.)(?:internal_)?xlora_"),
    ("LN tuning", r"\.ln_tuning_"),
    ("trainable tokens", r"(?:^|\.)trainable_tokens_"),
)
LYCORIS_BOFT = 4  # dimensions of its blocks: one more than OFT's, under the same name


def not_applied(shapes: Mapping[str, Shape]) -> tuple[Message, str] | None:
    """Return the kind of an adapter that is not applied here, and a tensor that tells it; None where there is none.

    Args:
        shapes: of the file's tensors, by name.
    """
    for title, pattern in _KINDS:
        if tensor := next((name for name in shapes if re.search(pattern, name)), None):
            blocks = title == "OFT" and len(shapes[tensor]) == LYCORIS_BOFT
            return Message("kind", "BOFT" if blocks else title), tensor
    if tensor := _wide_embedder(shapes):
        return Message("kind", "control LoRA"), tensor
    return None


def is_controlnets(module: str) -> bool:
    """Whether a module, by its name in a file, is one of a ControlNet's and not of the transformer's."""
    return re.search(r"(?:^|[._])control(?:net)?[._]", module) is not None


def _wide_embedder(shapes: Mapping[str, Shape]) -> str | None:
    """Return a tensor by which the embedder reads a control image beside the picture, where there is one."""
    down = re.compile(r"x_embedder(?:[._]2-1)?\.(?:lora_A|lora_down)(?:\.|$)")
    found = (name for name, shape in shapes.items() if down.search(name) and len(shape) > 1 and _is_wide(shape[1]))
    return next(found, None)


def _is_wide(numbers: int) -> bool:
    return numbers > PATCH_NUMBERS and numbers % PATCH_NUMBERS == 0
