"""A picture's parameters in its PNG: written, read, and turned back into a request.

Two text chunks: `parameters`, the line format that A1111's web UI began and that galleries read, and
`z-image-studio`, the whole request as JSON, enough to replay it exactly. Neither holds a date, so that the same
request with the same weights on the same machine gives the same file, byte for byte; dates live in the sidecar.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from core import bounded
from core.errors import RequestError
from core.events import Result
from core.messages import Message
from core.request import MODELS, MODES, SEED_MAX, DrawRequest, Resolved, TextToImage
from core.sizes import WeightsKind
from core.whole_file import write_together

APP_VERSION = "0.1.0"
SCHEMA = 1
PARAMETERS_CHUNK = "parameters"
REQUEST_CHUNK = "z-image-studio"
SAMPLER = "Euler"  # DiffSynth's flow-match scheduler takes plain Euler steps

# Bounds on what an untrusted file may make us read. Of text, Pillow bounds only what is compressed, by the same length.
MAX_FILE_BYTES = 256 << 20
MAX_TEXT = 1 << 20  # characters of a text chunk
MAX_LINE = 100_000  # characters of the line of pairs; whole lists of LoRAs and control units take some thousands

# How A1111 itself splits the last line, and how few pairs make it a line of the prompt instead. Its own expression is
# \s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)
# which begins again at every character of a word that no colon follows; here each word is looked at once.
_WORDS = re.compile(r"([\w \-/]+)(:?)\s*")
_QUOTED = re.compile(r'"(?:\\.|[^\\"])+"(?=,|$)')
_FEWEST_PAIRS = 3
_NEGATIVE = "Negative prompt:"


@dataclass(frozen=True)
class Lora:
    """A LoRA that a picture was drawn with: its name, the 12 hex digits that galleries look up, and how much of it."""

    name: str
    hash: str
    strength: float


@dataclass(frozen=True)
class Provenance:
    """Where a picture comes from.

    Attributes:
        weights: the kind of weights that drew it.
        fingerprints: maps each part's name to the identity of its files.
        inputs: maps each field of the request that names a file of the user's to the file's digest.
        lora: the LoRA that was used.
    """

    weights: WeightsKind
    fingerprints: Mapping[str, str]
    inputs: Mapping[str, str] = field(default_factory=dict)
    lora: Lora | None = None


def describe(request: Resolved, provenance: Provenance) -> dict[str, Any]:
    """Return the JSON of the `z-image-studio` chunk for a resolved request."""
    # Where a file lay is nobody's business, and would make the same request's PNG another one elsewhere.
    fields = request.model_dump()
    names = {name: Path(fields[name]).name for name in provenance.inputs}
    described = {
        "schema": SCHEMA,
        "app": f"Z-Image Studio {APP_VERSION}",
        "mode": request.mode,
        "request": fields | names,
        "weights": {"kind": provenance.weights, "fingerprints": dict(provenance.fingerprints)},
    }
    if provenance.lora:
        described["lora"] = asdict(provenance.lora)
    return described | ({"inputs": dict(provenance.inputs)} if provenance.inputs else {})


def a1111_text(request: Resolved, provenance: Provenance, size: tuple[int, int]) -> str:
    """Return the text of the `parameters` chunk for a resolved request and a picture of `size` (width, height)."""
    title = MODELS[request.model].title + (" miniature" if provenance.weights == "mini" else "")
    pairs = {
        "Steps": request.steps_run,
        "Sampler": SAMPLER,
        "CFG scale": f"{request.guidance:g}",
        "Seed": request.seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": title,
        **request.gallery_pairs,
        **_lora_pairs(provenance.lora),
        "Version": f"Z-Image Studio {APP_VERSION}",
    }
    lines = [request.prompt]
    if request.unwanted:
        lines.append(f"{_NEGATIVE} {request.unwanted}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items()))
    return "\n".join(lines)


def _lora_pairs(lora: Lora | None) -> dict[str, str]:
    """Return what A1111 writes of a LoRA. Readers split it by commas and colons, which a name must not have then."""
    if lora is None:
        return {}
    name = re.sub(r"[,:]", "_", lora.name)
    return {"Lora hashes": f"{name}: {lora.hash}", "Lora strength": f"{lora.strength:g}"}


def encode_png(image: Image.Image, request: Resolved, provenance: Provenance) -> bytes:
    """Return a PNG of `image` with both text chunks; the same arguments give the same bytes."""
    chunks = PngImagePlugin.PngInfo()  # writes tEXt, or iTXt where the text is more than Latin-1
    chunks.add_text(PARAMETERS_CHUNK, a1111_text(request, provenance, image.size))
    chunks.add_text(REQUEST_CHUNK, json.dumps(describe(request, provenance), sort_keys=True))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def file_stem(request: Resolved) -> str:
    """Return how a picture's file is called by default, without its ending."""
    return f"{request.stem}-{request.seed}"


def save(result: Result, path: Path) -> Path:
    """Write a result's PNG to `path` and its JSON beside it, both or none; return the JSON's path.

    Raises:
        NotWritten: the disk is full, or the folder cannot be written to.
    """
    sidecar = path.with_suffix(".json")
    described = json.dumps(result.sidecar, indent=2, ensure_ascii=False) + "\n"
    write_together({path: result.png, sidecar: described.encode()})
    return sidecar


@dataclass(frozen=True)
class Parameters:
    """What a picture says about how it was made.

    Attributes:
        source: `z-image-studio` where our own chunk was found, else `a1111`.
        values: fields of a request, by name, as far as they could be read.
        fingerprints: identities of the weights that drew it; empty when only A1111's text was found.
        not_restored: what the picture names and a request has no place for, by the name it has there.
        inputs: digests of the user's files that it was made with, by field; the fields hold the files' bare names.
    """

    source: str
    mode: str
    values: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    not_restored: Mapping[str, str]
    inputs: Mapping[str, str] = field(default_factory=dict)

    def request(self) -> DrawRequest:
        """Return the request that draws the picture again.

        Raises:
            RequestError: the picture holds a value that is not possible here.
        """
        if self.mode not in MODES:
            raise RequestError("mode", self.mode, ", ".join(MODES))
        return MODES[self.mode].parse(**self.values)


def read_png(path: Path) -> Parameters:
    """Read the parameters of a picture.

    Raises:
        RequestError: there is no such file, it is no picture, or it holds no parameters.
    """
    texts = _text_chunks(path)
    if REQUEST_CHUNK in texts:
        try:
            return _from_own_chunk(_json(texts[REQUEST_CHUNK]))
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # a damaged chunk of ours: A1111's text may still be whole
    if PARAMETERS_CHUNK in texts:
        return parse_a1111(texts[PARAMETERS_CHUNK])
    raise RequestError("file", path.name, "a PNG with its parameters inside, from Z-Image Studio or A1111's web UI")


def parse_a1111(text: str) -> Parameters:
    """Read the text of a `parameters` chunk; what is not understood lands in `not_restored`."""
    lines = text.strip().split("\n")
    pairs = _pairs(lines[-1]) if len(lines[-1]) <= MAX_LINE else {}
    if len(pairs) < _FEWEST_PAIRS:
        pairs = {}
    else:
        lines.pop()
    start = next((i for i, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    values: dict[str, Any] = {"prompt": "\n".join(lines[:start]).strip()}
    if negative := "\n".join(lines[start:]).removeprefix(_NEGATIVE).strip():
        values["negative_prompt"] = negative
    if match := re.fullmatch(r"(\d+)x(\d+)", pairs.get("Size", "")):
        # More digits than a number may have stay text, which a request refuses by the field's name.
        sides = (int(side) if len(side) <= bounded.MAX_DIGITS else side for side in match.groups())
        values["width"], values["height"] = sides
        del pairs["Size"]
    for name, key, convert in (("steps", "Steps", int), ("cfg", "CFG scale", float), ("seed", "Seed", int)):
        if key in pairs:
            try:
                values[name] = convert(pairs[key])
                del pairs[key]
            except ValueError:
                pass  # stays in `pairs`, and so in `not_restored`
    if not 0 <= values.get("seed", 0) <= SEED_MAX:  # A1111 writes -1 for a random seed
        values["seed"] = 0
    for name, model in MODELS.items():
        if pairs.get("Model", "").removesuffix(" miniature") == model.title:
            values["model"] = name
            values["weights"] = "mini" if pairs["Model"].endswith(" miniature") else "auto"
            del pairs["Model"]
            break
    for implied in ("Sampler", "Version"):  # every request of ours has the one sampler
        if implied == "Version" or pairs.get(implied) == SAMPLER:
            pairs.pop(implied, None)
    return Parameters("a1111", TextToImage.mode, values, {}, pairs)


def _pairs(line: str) -> dict[str, str]:
    """Return the pairs of `key: value, key: value`, a value with commas in quotes, in a time linear in the line."""
    pairs, place = {}, 0
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


def _json(text: str) -> Any:
    """Return what a JSON text holds.

    Raises:
        ValueError: it is no JSON, its nesting has no end, or it holds half a character, which no page can show.
    """
    value = bounded.loads(text)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def _from_own_chunk(chunk: Mapping[str, Any]) -> Parameters:
    fields, mode = dict(chunk["request"]), MODES.get(chunk["mode"], TextToImage)
    known = {name: value for name, value in fields.items() if name in mode.model_fields}
    rest = {name: str(value) for name, value in fields.items() if name not in known}
    fingerprints, inputs = dict(chunk["weights"]["fingerprints"]), dict(chunk.get("inputs", {}))
    return Parameters(REQUEST_CHUNK, str(chunk["mode"]), known, fingerprints, rest, inputs)


def _text_chunks(path: Path) -> dict[str, str]:
    """Return a picture's text chunks, without decoding its pixels."""
    wanted = Message("png_file", "a PNG file")
    if not path.is_file():
        raise RequestError("file", str(path), Message("no_file", "{wanted} that exists", wanted=wanted))
    if path.stat().st_size > MAX_FILE_BYTES:
        allowed = Message("too_large", "{wanted} of up to {size} MiB", wanted=wanted, size=MAX_FILE_BYTES >> 20)
        raise RequestError("file", path.name, allowed)
    try:
        with Image.open(path, formats=["PNG"]) as image:
            # Not `image.text`, which decodes the pixels; galleries, A1111 and we write the text before them.
            texts = {key: value for key, value in image.info.items() if isinstance(key, str) and isinstance(value, str)}
            return {key: text for key, text in texts.items() if len(text) <= MAX_TEXT}
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise RequestError("file", path.name, wanted) from error


def _quoted(value: Any) -> str:
    """Quote a value as A1111 does: as JSON, where a comma, colon or newline would split it."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


def _unquoted(value: str) -> str:
    if value.startswith('"') and value.endswith('"'):
        try:
            return str(_json(value))
        except ValueError:
            return value
    return value.strip()
