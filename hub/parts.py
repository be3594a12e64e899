"""Which weights there are: the parts that a pipeline is made of, and which of them each mode needs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Literal

from core.errors import RequestError
from core.messages import Message
from core.request import MODES, Preprocessor

ROOT = Path(__file__).resolve().parent.parent
MINI_ROOT = ROOT / "weights" / "mini"
FETCH = "run.bat models download" if os.name == "nt" else "bash run.sh models download"

# DiffSynth tells models apart by these (diffsynth/configs/model_configs.py, 2.1.12); see `model_hash`.
_TRANSFORMER = "fc3a8a1247fe185ce116ccbe0e426c28"
_TEXT_ENCODER = "0f050f62a88876fea6eae0a18dac5a2e"
_VAE = "1aafa3cc91716fb6b300cc1cd51b85a3"
_CONTROLNET = "1677708d40029ab380a95f6c731a57d7"
CONTROLNET_LITE = (
    "6236be6877f14ce75fe63ed33c467688"  # the same with 3 control layers beside the transformer's in place of 15
)
ORIGINAL_VAE = "21ea55f476dfc4fd135587abb59dfe5d"  # the same VAE in the names of the original code: ae.safetensors
KNOWN_HASHES: Mapping[str, Message] = {
    _TRANSFORMER: Message("transformer", "a Z-Image transformer (Base or Turbo)"),
    _TEXT_ENCODER: Message("text_encoder", "the text encoder"),
    _VAE: Message("vae", "the VAE"),
    _CONTROLNET: Message("controlnet", "the ControlNet"),
    CONTROLNET_LITE: Message("controlnet_lite", "the small ControlNet"),
    "aa3563718e5c3ecde3dfbb020ca61180": Message("omni_transformer", "the Z-Image-Omni-Base transformer"),
}


# How a part is published: by its authors, or once more by Comfy-Org, one file a part and Turbo's transformer in bf16.
Edition = Literal["official", "repackaged"]
OFFICIAL: Edition = "official"
REPACKAGED: Edition = "repackaged"


@dataclass(frozen=True)
class Repackaged:
    """The same part, published once more: one file `pattern` of `repo`, of about `size` bytes.

    `hash` is the `model_hash` that it has where that is not the part's own.
    """

    repo: str
    pattern: str
    size: int
    hash: str | None = None


@dataclass(frozen=True)
class Part:
    """One thing that a pipeline is made of.

    `pattern` is a glob inside `repo`; `also` are other names that the repository goes by (ModelScope's). `size` is what
    is fetched and lies on disk, in bytes: tensors as published, without the headers' few kilobytes. `hash` is the
    `model_hash` that the files must have; a part without one is known by its size alone. `older` are names of files in
    `repo` that do in place of `pattern` where that is not here, the better first, and `other_hashes` what some of them
    have. `repackaged` is where it is published once more; `alone` is whether nothing beside the pattern's file belongs
    to the part.
    """

    name: str
    repo: str
    pattern: str
    size: int
    needed_by: str
    hash: str | None = None
    also: tuple[str, ...] = ()
    older: tuple[str, ...] = ()
    other_hashes: tuple[str, ...] = ()
    repackaged: Repackaged | None = None
    alone: bool = False

    @property
    def hashes(self) -> tuple[str | None, ...]:
        """Every `model_hash` that its files may have."""
        return self.hash, *self.other_hashes

    def in_edition(self, edition: Edition) -> Part:
        """Return the part as it is published in that way; itself where there is no such one."""
        again = self.repackaged
        if edition == OFFICIAL or again is None:
            return self
        hashes = (again.hash,) if again.hash else ()
        return replace(
            self,
            repo=again.repo,
            pattern=again.pattern,
            size=again.size,
            also=(),
            other_hashes=hashes,
            repackaged=None,
            alone=True,
        )

    @property
    def title(self) -> str:
        """What is to be fetched, and how much of it."""
        return f"{self.repo}/{self.pattern} ({size_text(self.size)})"


# The ControlNet's releases after the first by year and month, as their names have it, and what they were taught first.
_UNION = "Z-Image-Turbo-Fun-Controlnet-Union-2.1"
_OLDER_UNIONS = ("-2601-8steps", "-8steps", "", "-lite-2602-8steps", "-lite-2601-8steps", "-lite-8steps", "-lite")
FIRST_UNION = 2512
TAUGHT_SINCE: Mapping[Preprocessor, int] = {"gray": 2602, "scribble": 2601}


def controlnet_release(name: str) -> int:
    """Return the year and month of a ControlNet's file by its name: 2602 is February 2026."""
    dated = re.search(r"-(2[6-9][01]\d)(?!\d)", name)
    return int(dated[1]) if dated else FIRST_UNION


def controlnet_rank(name: str) -> tuple[bool, int]:
    """Return what ControlNet files are compared by: any large one is better than a small one, then the newer is."""
    return "lite" not in name.lower(), controlnet_release(name)


_TURBO, _BASE = "Tongyi-MAI/Z-Image-Turbo", "Tongyi-MAI/Z-Image"
_COMFY = "Comfy-Org/z_image_turbo"  # on both hubs

# Sizes: numbers of the official shapes x bytes each. The hub holds Turbo's transformer in fp32 (3 shards) and Base's
# in bf16 (2 shards); both take 12.3 GB in memory as bf16. Upscaler: the published file. Tokenizer: the hub's listing.
PARTS: Mapping[str, Part] = {
    part.name: part
    for part in (
        Part(
            "turbo",
            _TURBO,
            "transformer/*.safetensors",
            24_619_634_944,
            "text to image with Turbo, ControlNet, upscale",
            _TRANSFORMER,
            repackaged=Repackaged(
                _COMFY, "split_files/diffusion_models/z_image_turbo_bf16.safetensors", 12_309_817_472
            ),
        ),
        Part("base", _BASE, "transformer/*.safetensors", 12_309_817_472, "text to image with Base", _TRANSFORMER),
        Part(
            "text_encoder",
            _TURBO,
            "text_encoder/*.safetensors",
            8_044_936_192,
            "everything",
            _TEXT_ENCODER,
            repackaged=Repackaged(_COMFY, "split_files/text_encoders/qwen_3_4b.safetensors", 8_044_936_192),
        ),
        # DiffSynth's model_configs.py names vae/vae/… in a comment; the repository has it here.
        Part(
            "vae",
            _TURBO,
            "vae/diffusion_pytorch_model.safetensors",
            167_639_366,
            "everything",
            _VAE,
            repackaged=Repackaged(_COMFY, "split_files/vae/ae.safetensors", 335_278_732, ORIGINAL_VAE),
        ),
        Part("tokenizer", _TURBO, "tokenizer/*", 15_900_000, "everything"),
        Part(
            "controlnet",
            "alibaba-pai/Z-Image-Turbo-Fun-Controlnet-Union-2.1",
            f"{_UNION}-2602-8steps.safetensors",
            6_712_451_584,
            "ControlNet",
            _CONTROLNET,
            also=("PAI/Z-Image-Turbo-Fun-Controlnet-Union-2.1",),
            older=tuple(f"{_UNION}{which}.safetensors" for which in _OLDER_UNIONS),
            other_hashes=(CONTROLNET_LITE,),
        ),
        # Published in fp32. No hash: later releases of transformers rename its tensors when they read it.
        Part(
            "depth",
            "depth-anything/Depth-Anything-V2-Small-hf",
            "model.safetensors",
            99_140_356,
            "the preprocessor Depth",
        ),
        Part("upscaler", "lllyasviel/Annotators", "RealESRGAN_x4plus.pth", 67_040_989, "upscale"),
    )
}


def weight(names: Sequence[str], edition: Edition) -> int:
    """Return what parts weigh in bytes, by their names, as they are published in that way."""
    return sum(PARTS[name].in_edition(edition).size for name in names)


def needs(mode: str, model: str) -> tuple[str, ...]:
    """Return the names of the parts that a mode ("generate", "controlnet", "upscale") needs with a model.

    Raises:
        RequestError: there is no such mode, or it does not run with that model.
    """
    if mode not in MODES:
        raise RequestError("mode", mode, ", ".join(sorted(MODES)))
    by_model = {str(known): parts for known, parts in MODES[mode].needs.items()}
    if model not in by_model:
        allowed = Message("models_of_mode", "{models} in mode {mode}", models=any_of(list(by_model)), mode=mode)
        raise RequestError("model", model, allowed)
    return by_model[model]


# --- texts -------------------------------------------------------------------------------------------------------


def any_of(choices: Sequence[Message | str]) -> Message | str:
    """Return choices as a phrase: "a", "a or b", "a or b or c"."""
    return reduce(lambda some, last: Message("or", "{some} or {last}", some=some, last=last), choices)


def all_of(items: Sequence[Message | str]) -> Message | str:
    """Return items as a phrase: "a", "a and b", "a and b and c"."""
    return reduce(lambda some, last: Message("and", "{some} and {last}", some=some, last=last), items)


def size_text(size: int) -> str:
    """Return a number of bytes in decimal GB or MB, as the hub shows it."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
