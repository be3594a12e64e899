"""What a picture says about how it was made, and what of another program's words a request of ours has a place for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from core import bounded
from core.errors import RequestError
from core.request import MODELS, MODES, SEED_MAX, DrawRequest, Model, TextToImage

SHOWN = 400  # characters of a value that is only named; a page of JSON helps nobody

# What pictures are called by a request's fields, for those that are named and not restored: as A1111 writes them.
LABELS = {
    "prompt": "Prompt",
    "negative_prompt": "Negative prompt",
    "steps": "Steps",
    "cfg": "CFG scale",
    "seed": "Seed",
    "width": "Width",
    "height": "Height",
    "sampler": "Sampler",
    "model": "Model",
}

MINIATURE = " miniature"  # after a model's title, where the miniature drew

# Ours is plain Euler, which the programs call so; k-diffusion's prefix is NovelAI's.
_OUR_SAMPLER = {"euler", "k_euler"}

_WHOLE = re.compile(r"[+-]?[0-9]{1,20}(\.0{0,20})?")  # "8.0" is what programs write that keep floats
_LORA_TAG = re.compile(r"<(?:lora|lyco):([^:<>]{1,200}):?([^<>]{0,100})>")

# Of a model's file name: Z-Image in any spelling, and what says nothing but in which numbers it is kept.
_Z_IMAGE = re.compile(r"z[ _-]?image", re.IGNORECASE)
_SAYS_NOTHING = re.compile(
    r"turbo|base|[bf][fp]?(4|8|16|32)|nvfp4|mxfp8|int[48]|e4m3(fn)?|e5m2|scaled|mixed|svdq|r[0-9]{1,3}|q[2-8]|[0-9]|k|[xsml]{1,2}"
    r"|gguf|safetensors|miniature|model|diffusion|diffusers|comfy|nunchaku"
)


@dataclass(frozen=True)
class Parameters:
    """What a picture says about how it was made.

    Attributes:
        source: which program's form was read: `z-image-studio` where our own chunk was found, else `a1111`, which many
            write, `comfyui`, `invokeai`, `swarmui`, `fooocus`, `novelai` or `json`.
        values: fields of a request, by name, as far as they could be read.
        fingerprints: identities of the weights that drew it; empty for pictures of other programs.
        not_restored: what the picture names and a request has no place for, by the name it has there.
        inputs: digests of the user's files that it was made with, by field; the fields hold the files' bare names.
        made_by: the name and version of the program that drew it, of pictures of ours.
    """

    source: str
    mode: str
    values: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    not_restored: Mapping[str, str]
    inputs: Mapping[str, str] = field(default_factory=dict)
    made_by: str = ""

    @property
    def filled(self) -> dict[str, Any]:
        """The values, and what follows where the picture says nothing: nothing of it is what was asked for before.

        Where it names no model of ours, that is the one that can do what it asks for.
        """
        if self.mode != TextToImage.mode:
            return dict(self.values)
        guided = self.values.get("cfg", 1) != 1 or self.values.get("negative_prompt")
        unsaid = {"model": "base" if guided else "turbo", "negative_prompt": "", "seed": 0, "lora": "", "variety": 0.0}
        return {**unsaid, **self.values}

    def request(self, **instead: Any) -> DrawRequest:
        """Return the request that draws the picture again.

        Args:
            **instead: fields that are asked for in place of the picture's.

        Raises:
            RequestError: the picture holds a value that is not possible here.
        """
        if self.mode not in MODES:
            raise RequestError("mode", self.mode, ", ".join(MODES))
        return MODES[self.mode].parse(**{**self.filled, **instead})


def restored(source: str, found: Mapping[str, Any], rest: Mapping[str, Any]) -> Parameters:
    """Return what of another program's parameters becomes a request's fields; everything else is named.

    Args:
        source: which program's form was read.
        found: by a field's name in a request, `sampler` and `loras` (pairs of a name and a strength) besides, what was
            read, of any type.
        rest: by the name that it has there, what has no such field.
    """
    values: dict[str, Any] = {}
    named = {name: shown(value) for name, value in rest.items() if value not in (None, "", False, [], {})}

    def name_it(field_name: str) -> None:
        if found.get(field_name) not in (None, ""):
            named[LABELS[field_name]] = shown(found[field_name])

    for name in ("prompt", "negative_prompt"):
        if not isinstance(found.get(name), str):
            name_it(name)
        elif (text := one_line_end(found[name]).strip()) or name == "prompt":
            values[name] = text
    for name in ("steps", "width", "height", "seed"):
        number = whole(found.get(name))
        if number is None and name in ("width", "height") and str(found.get(name, "")).isdigit():
            values[name] = str(found[name])  # of more digits than a number may have: refused by the field's name
        elif number is None or (name == "seed" and number > SEED_MAX):
            name_it(name)
        else:
            values[name] = max(number, 0) if name == "seed" else number  # A1111 writes -1 for a random seed
    factor = number_of(found.get("cfg"))
    if factor is None:
        name_it("cfg")
    else:
        values["cfg"] = factor or 1.0
    if str(found.get("sampler", "")).casefold() not in _OUR_SAMPLER:
        name_it("sampler")
    _take_model(found.get("model"), values, named)
    if loras := [*found.get("loras", ()), *_LORA_TAG.findall(values.get("prompt", ""))]:
        named["LoRA"] = shown(
            ", ".join(f"{lora} ({much})" if much not in (None, "") else str(lora) for lora, much in loras)
        )
    return Parameters(source, TextToImage.mode, values, {}, named)


def _take_model(name: Any, values: dict[str, Any], named: dict[str, str]) -> None:
    """Put the model that a file's name means among the values; what it cannot take of them is named."""
    if not isinstance(name, str) or not name.strip():
        if name not in (None, ""):
            named[LABELS["model"]] = shown(name)
        return
    model, whole_name = model_of(name)
    if model:
        values["model"] = model
    if model and name == MODELS[model].title + MINIATURE:  # ours
        values["weights"] = "mini"
    if not whole_name:
        named[LABELS["model"]] = shown(name)
    if model and not MODELS[model].guided:
        if "negative_prompt" in values:
            named[LABELS["negative_prompt"]] = shown(values.pop("negative_prompt"))
        if values.get("cfg", MODELS[model].cfg) != MODELS[model].cfg:
            named[LABELS["cfg"]] = shown(f"{values.pop('cfg'):g}")


def model_of(name: str) -> tuple[Model | None, bool]:
    """Return which model a file's name means, None for one that is not Z-Image, and whether that is all it says.

    A fine-tuned model is taken for what it was made from, and named besides.
    """
    name = PurePosixPath(name[:SHOWN].replace("\\", "/")).name.lower()
    if not _Z_IMAGE.search(name):
        return None, False
    words = [word for word in re.split(r"[^a-z0-9]+", _Z_IMAGE.sub(" ", name)) if word]
    # "De-Turbo" has unlearnt what makes Turbo quick, and is guided again.
    turbo = "turbo" in "".join(words) and "deturbo" not in "".join(words)
    return "turbo" if turbo else "base", all(_SAYS_NOTHING.fullmatch(word) for word in words)


def whole(value: Any) -> int | None:
    """Return a whole number that is written as a number or a text, None for anything else."""
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        return int(value.strip().partition(".")[0])
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**64:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def number_of(value: Any) -> float | None:
    """Return a finite number that is written as a number or a text, None for anything else."""
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def one_line_end(text: str) -> str:
    """Return a text whose lines end as they do here."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def shown(value: Any) -> str:
    """Return a value as a text of bounded length; of what has a name, such as a model of InvokeAI's, the name."""
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        value = value["name"]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def finite(value: Any) -> Any:
    """Return a value, as a text where it is an infinite number or none at all, which JSON has no place for."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def all_finite(value: Any) -> Any:
    """Return a value with everything in it as `finite` has it, in objects and lists as JSON has them."""
    if isinstance(value, Mapping):
        return {str(name): all_finite(item) for name, item in value.items()}
    return [all_finite(item) for item in value] if isinstance(value, list | tuple) else finite(value)


def json_of(text: str) -> Any:
    """Return what a JSON text holds.

    Raises:
        ValueError: it is no JSON, its nesting has no end, or it holds half a character, which no page can show.
    """
    value = bounded.loads(text)
    json.dumps(value, ensure_ascii=False).encode()
    return value
