"""What other programs write into pictures: A1111's lines, which many write, and the JSON of those that do not.

Facts on the forms are from the programs' own source: A1111's `infotext_utils.py`, InvokeAI's `metadata.py`, SwarmUI's
`T2IParamInput`, Fooocus's `meta_parser.py`, NovelAI's pictures as A1111 reads them, stable-diffusion.cpp's `main.cpp`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from core import comfyui
from core.parameters import Parameters, json_of, one_line_end, restored

MAX_LINE = 100_000  # characters of the line of pairs; whole lists of LoRAs and control units take some thousands

# How A1111 itself splits the last line, and how few pairs make it a line of the prompt instead. Its own expression is
# \s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)
# which begins again at every character of a word that no colon follows; here each word is looked at once.
_WORDS = re.compile(r"([\w \-/]+)(:?)\s*")
_QUOTED = re.compile(r'"(?:\\.|[^\\"])+"(?=,|$)')
_FEWEST_PAIRS = 3
_FIRST_PAIR = "Steps:"
_MOST_BEGINS = 10  # of lines that begin with it, the last of which is the program's own
NEGATIVE = "Negative prompt:"

_SIZE = re.compile(r"\(?\s*([0-9.]+)\s*[x×X,*]\s*([0-9.]+)\s*\)?")

# JSON, or what was meant to be some, by how it begins: not "{red|blue} cat", nor "[cat:dog:0.5]".
_JSON = re.compile(r'\s*(\{\s*["}]|\[\s*[\[\]{"]|\[[0-9.,\s]*\]\s*$)')

# Where a picture's parameters are, by the names of `core.embedded`, the likeliest first.
_PLACES = ("parameters", "UserComment", "comment", "ImageDescription", "Comment")

# A1111's names -> fields. stable-diffusion.cpp names a model that is a transformer alone "Unet".
_PAIRS = {"Steps": "steps", "CFG scale": "cfg", "Seed": "seed", "Sampler": "sampler", "Model": "model"}

# JSON's names in lower case, letters and digits alone -> fields; the first that is there holds.
_FIELDS = {
    "prompt": ("prompt", "positiveprompt", "positive"),
    "negative_prompt": ("negativeprompt", "negative", "uc"),
    "steps": ("steps", "numinferencesteps", "numsteps"),
    "cfg": ("cfgscale", "cfg", "guidancescale", "scale"),
    "seed": ("seed",),
    "width": ("width",),
    "height": ("height",),
    "sampler": ("sampler", "samplername", "comfyuisampler"),
    "model": ("model", "modelname", "basemodel", "basemodelname", "modelweights", "checkpoint"),
}
_FEWEST_FIELDS = 3  # of a request that JSON must have to be a picture's parameters, its prompt among them

# Of JSON, what changes no picture, or says again what was read: not worth naming.
_NO_PART = {
    *("version", "swarmversion", "appversion", "software", "app", "metadatascheme", "createdby", "date", "images"),
    *("fullprompt", "fullnegativeprompt", "generationtime", "signedhash", "requesttype", "nsamples", "loraweights"),
}


def parse_a1111(text: str) -> Parameters:
    """Read the text of a `parameters` chunk; what is not understood lands in `not_restored`."""
    lines = one_line_end(text).strip().split("\n")
    place, end, pairs = _parameters_line(lines)
    rest: dict[str, Any] = {**_further(lines[end:]), **pairs}
    lines = lines[:place]
    # The last such line: a text that was pasted into the prompt whole has one of its own.
    starts = [number for number, line in enumerate(lines) if line.lstrip().startswith(NEGATIVE)]
    start = starts[-1] if starts else len(lines)
    found: dict[str, Any] = {
        "prompt": "\n".join(lines[:start]),
        "negative_prompt": "\n".join(lines[start:]).lstrip().removeprefix(NEGATIVE),
    }
    if sides := _sides(pairs.get("Size")):
        found["width"], found["height"] = sides
        del rest["Size"]
    for key, name in _PAIRS.items():
        if key in pairs:
            found[name] = rest.pop(key)
    if not found.get("model") and "Unet" in rest:
        found["model"] = rest.pop("Unet")
    rest.pop("Version", None)
    return restored("a1111", found, rest)


def has_parameters(text: str) -> bool:
    """Return whether a text has A1111's line of parameters; in what begins like JSON, a line that is nothing else."""
    lines = one_line_end(text).strip().split("\n")
    place, _, pairs = _parameters_line(lines)
    return bool(pairs) and (not _JSON.match(text) or lines[place].startswith(_FIRST_PAIR))


def _parameters_line(lines: list[str]) -> tuple[int, int, dict[str, str]]:
    """Return where the line of pairs begins and ends, and its pairs; the end of the text and none where there is none.

    It is the last line, or, where an extension has written on behind it, the last one that begins with its first pair.
    Where somebody has wrapped it, each of its lines but the last ends with a comma, or has one pair.
    """
    last = _pairs(lines[-1])
    if len(last) >= _FEWEST_PAIRS and _FIRST_PAIR.rstrip(":") in last:
        return len(lines) - 1, len(lines), last
    begins = [place for place, line in enumerate(lines) if line.startswith(_FIRST_PAIR)]
    for place in reversed(begins[-_MOST_BEGINS:]):
        end = next((end for end in range(place + 1, len(lines)) if lines[end - 1].rstrip()[-1:] != ","), len(lines))
        pairs = _pairs(" ".join(lines[place:end]))
        if len(pairs) >= _FEWEST_PAIRS:
            return place, end, pairs
        pairs = _pairs(", ".join(lines[place:]))
        if len(pairs) >= _FEWEST_PAIRS and {"Seed", "Sampler"} & pairs.keys():
            return place, len(lines), pairs
    return (len(lines) - 1, len(lines), last) if len(last) >= _FEWEST_PAIRS else (len(lines), len(lines), {})


def _further(lines: Iterable[str]) -> dict[str, str]:
    """Return what an extension has written behind the line of parameters, such as `Template: …`, by its names."""
    found: dict[str, list[str]] = {}
    key = "Text"
    for line in lines:
        words = _WORDS.match(line)
        if words and words[2] and words[1].strip():
            key, line = words[1].strip(), line[words.end() :]
        found.setdefault(key, []).append(line)
    return {key: "\n".join(text).strip() for key, text in found.items()}


def _pairs(line: str) -> dict[str, str]:
    """Return the pairs of `key: value, key: value`, a value with commas in quotes, in a time linear in the line."""
    pairs: dict[str, str] = {}
    place = 0 if len(line) <= MAX_LINE else len(line)
    while words := _WORDS.search(line, place):
        place, key = words.end(), words[1].lstrip(" -/")
        if not words[2] or len(key) < 2:  # no key has a single letter
            continue
        quoted = _QUOTED.match(line, place)
        end = quoted.end() if quoted else line.find(",", place)
        end = len(line) if end < 0 else end
        pairs[key] = _unquoted(line[place:end])
        place = end + 1
    return pairs


def _unquoted(value: str) -> str:
    if value.startswith('"') and value.endswith('"'):
        try:
            return str(json_of(value))
        except ValueError:
            return value
    return value.strip()


def _sides(size: Any) -> tuple[str, str] | None:
    """Return the width and height of a size in one text, such as "1024 x 768" or "(1024, 768)"."""
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) and len(size) <= MAX_LINE else None
    return (match[1], match[2]) if match else None


def parse(texts: Mapping[str, str]) -> Parameters | None:
    """Return the parameters of a picture by its texts, as `core.embedded` finds them; None where it holds none."""
    objects = {key: value for key, text in texts.items() if (value := _object(text)) is not None}
    for key in _PLACES:
        if key in texts and key not in objects and has_parameters(texts[key]):
            return parse_a1111(texts[key])
    for read in (_invokeai, _novelai, _swarmui, _usual, comfyui.parse):
        if (found := read(objects, texts)) is not None:
            return found
    # A prompt alone, as galleries leave it; a comment of EXIF's may be anything that a camera or a phone says.
    bare = texts.get("parameters", "")
    return parse_a1111(bare) if bare.strip() and not _JSON.match(bare) else None


def _object(text: str) -> dict[str, Any] | None:
    """Return the JSON object that a text is, None for any other text."""
    try:
        value = json_of(text) if _JSON.match(text) else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _invokeai(objects: Mapping[str, dict[str, Any]], texts: Mapping[str, str]) -> Parameters | None:
    """Read InvokeAI's own chunk, or that of its versions before 3, in which an image is an object of its own."""
    if "invokeai_metadata" in objects:
        fields = dict(objects["invokeai_metadata"])
        if str(fields.get("generation_mode")).endswith("txt2img"):
            del fields["generation_mode"]
        fields.setdefault("sampler", fields.pop("scheduler", None))  # what is called a sampler elsewhere
        return _from_fields("invokeai", fields)
    old = objects.get("sd-metadata", {})
    if isinstance(old.get("image"), dict):
        return _from_fields("invokeai", {"model": old.get("model_weights"), **old["image"]})
    return None


def _novelai(objects: Mapping[str, dict[str, Any]], texts: Mapping[str, str]) -> Parameters | None:
    """Read NovelAI's chunks, which its WebP files hold as one object in the comment."""
    inside = objects.get("UserComment", {})
    if isinstance(inside.get("Comment"), str) and (comment := _object(inside["Comment"])) is not None:
        texts, objects = {key: str(value) for key, value in inside.items()}, {"Comment": comment}
    if "Comment" not in objects or not ({"uc", "v4_prompt"} & objects["Comment"].keys()):
        return None
    fields = dict(objects["Comment"])
    fields.setdefault("prompt", texts.get("Description", ""))
    return _from_fields("novelai", {**fields, "model": texts.get("Source")})


def _swarmui(objects: Mapping[str, dict[str, Any]], texts: Mapping[str, str]) -> Parameters | None:
    for value in objects.values():
        if isinstance(value.get("sui_image_params"), dict):
            return _from_fields("swarmui", value["sui_image_params"])
    return None


def _usual(objects: Mapping[str, dict[str, Any]], texts: Mapping[str, str]) -> Parameters | None:
    """Read Fooocus's JSON, and any other whose fields have the usual names."""
    for key in _PLACES:
        found = _from_fields("fooocus" if "metadata_scheme" in objects.get(key, {}) else "json", objects.get(key, {}))
        if found.values.get("prompt") and len(found.values) >= _FEWEST_FIELDS:
            return found
    return None


def _from_fields(source: str, fields: Mapping[str, Any]) -> Parameters:
    """Return the parameters that JSON's fields are, by their usual names."""
    plain = {re.sub("[^a-z0-9]", "", key.lower()): key for key in fields if fields[key] is not None}
    found: dict[str, Any] = {}
    read: set[str] = set()
    for name, spellings in _FIELDS.items():
        if key := next((plain[spelling] for spelling in spellings if spelling in plain), None):
            found[name] = fields[key]
            read.add(key)
    for name in ("prompt", "negative_prompt", "model"):
        found[name] = _text_of(found.get(name))
    for spelling in ("size", "resolution"):
        if "width" not in found and spelling in plain and (sides := _sides(fields[plain[spelling]])):
            found["width"], found["height"] = sides
            read.add(plain[spelling])
    of_loras = {key for spelling, key in plain.items() if re.fullmatch("loras?|loracombined[0-9]{1,2}", spelling)}
    # Fooocus says them twice.
    once = {plain["loras"]} if "loras" in plain and fields[plain["loras"]] else of_loras
    found["loras"] = [lora for key in sorted(once) for lora in _loras_of(fields[key], fields.get("loraweights"))]
    named = [key for spelling, key in plain.items() if spelling not in _NO_PART and key not in read | of_loras]
    return restored(source, found, {key: fields[key] for key in named})


def _text_of(value: Any) -> Any:
    """Return the text that a value is: itself, an object's name, or the texts of a list of prompts with weights."""
    if isinstance(value, Mapping):
        return next((value[key] for key in ("name", "model_name", "prompt") if isinstance(value.get(key), str)), None)
    if isinstance(value, list):
        texts = [text for item in value if isinstance(text := _text_of(item), str)]
        return "\n".join(texts)
    return value


def _loras_of(listed: Any, weights: Any) -> Iterator[tuple[str, Any]]:
    """Yield the LoRAs that a field of JSON names, each with its strength where that is known."""
    for number, lora in enumerate(listed if isinstance(listed, list) else [listed]):
        much = weights[number] if isinstance(weights, list) and number < len(weights) else None
        if isinstance(lora, list) and lora:  # name, strength, hash
            lora, much = lora[0], lora[1] if len(lora) > 1 else None
        elif isinstance(lora, Mapping):
            much = lora.get("weight", lora.get("strength"))
            lora = next(
                (name for part in (lora, lora.get("model"), lora.get("lora")) if (name := _text_of(part))), None
            )
        if isinstance(lora, str) and lora and lora != "None":
            yield lora, much
