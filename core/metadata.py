"""A picture's parameters in its PNG: written, and read again; those of other programs are read by `core.foreign`.

Two text chunks: `parameters`, the line format that A1111's web UI began and that galleries read, and
`z-image-studio`, the whole request as JSON, enough to replay it exactly. Neither holds a date, so that the same
request with the same weights on the same machine gives the same file, byte for byte; dates live in the sidecar.
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from core import embedded, foreign
from core.errors import RequestError
from core.events import Result
from core.foreign import NEGATIVE
from core.messages import Message
from core.parameters import MINIATURE, Parameters, finite, json_of, shown
from core.request import MODELS, MODES, DrawRequest, Resolved, TextToImage
from core.sizes import WeightsKind
from core.whole_file import write_together

APP_VERSION = "0.1.0"
SCHEMA = 1
PARAMETERS_CHUNK = "parameters"
REQUEST_CHUNK = "z-image-studio"
SAMPLER = "Euler"  # DiffSynth's flow-match scheduler takes plain Euler steps

# Whose pictures are read besides ours, as a sentence names them; several more write as A1111 does.
PROGRAMS = (
    *("A1111", "Forge", "SD.Next", "stable-diffusion.cpp"),
    *("ComfyUI", "SwarmUI", "InvokeAI", "Fooocus", "NovelAI"),
)


@dataclass(frozen=True)
class Lora:
    """A LoRA that a picture was drawn with: its name, the 12 hex digits that galleries look up, and how much of it."""

    name: str
    hash: str
    strength: float


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of the user's that drew a picture: its name, and the identity of its files.

    `fingerprint` is "sha256:…" of a file's content where that is known, else as `hub.checkpoint.fingerprint` has it.
    """

    name: str
    fingerprint: str


@dataclass(frozen=True)
class Provenance:
    """Where a picture comes from.

    Attributes:
        weights: the kind of weights that drew it.
        fingerprints: maps each part's name to the identity of its files.
        inputs: maps each field of the request that names a file of the user's to the file's digest.
        lora: the LoRA that was used.
        checkpoint: the user's own that drew in place of the published transformer.
    """

    weights: WeightsKind
    fingerprints: Mapping[str, str]
    inputs: Mapping[str, str] = field(default_factory=dict)
    lora: Lora | None = None
    checkpoint: Checkpoint | None = None


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
    if provenance.checkpoint:
        described["checkpoint"] = asdict(provenance.checkpoint)
    return described | ({"inputs": dict(provenance.inputs)} if provenance.inputs else {})


def a1111_text(request: Resolved, provenance: Provenance, size: tuple[int, int]) -> str:
    """Return the text of the `parameters` chunk for a resolved request and a picture of `size` (width, height)."""
    title = MODELS[request.model].title + (MINIATURE if provenance.weights == "mini" else "")
    pairs = {
        "Steps": request.steps_run,
        "Sampler": SAMPLER,
        "CFG scale": f"{request.guidance:g}",
        "Seed": request.seed,
        "Size": f"{size[0]}x{size[1]}",
        **_model_pairs(title, provenance.checkpoint),
        **request.gallery_pairs,
        **_lora_pairs(provenance.lora),
        "Version": f"Z-Image Studio {APP_VERSION}",
    }
    lines = [request.prompt]
    if request.unwanted:
        lines.append(f"{NEGATIVE} {request.unwanted}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items()))
    return "\n".join(lines)


def _model_pairs(title: str, checkpoint: Checkpoint | None) -> dict[str, str]:
    """Return what A1111 writes of a model: its name, and of a file that was hashed whole 10 digits of the SHA-256."""
    if checkpoint is None:
        return {"Model": title}
    kind, _, digest = checkpoint.fingerprint.partition(":")
    return ({"Model hash": digest[:10]} if kind == "sha256" else {}) | {"Model": checkpoint.name, "Base model": title}


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


def differences(found: Parameters, result: Result) -> dict[str, tuple[str, str]]:
    """Return what a picture of ours and a result were not both made of, by name: what it was there, and is here.

    Args:
        found: the picture's parameters, from our own chunk.
        result: what its request was drawn to now.
    """
    now = _from_own_chunk(result.sidecar)
    pairs = [
        ({"version": found.made_by}, {"version": now.made_by}),
        (found.fingerprints, now.fingerprints),
        (found.inputs, now.inputs),
        (found.values, now.values),
    ]
    return {
        name: (shown(str(before.get(name, "none"))), shown(str(after.get(name, "none"))))
        for before, after in pairs
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    }


def file_stem(request: DrawRequest) -> str:
    """Return how a picture's file is called by default, without its ending."""
    return f"{request.stem}-{request.seed}"


def sidecar_path(path: Path) -> Path:
    """Return where the JSON of a picture's file lies."""
    return path.with_suffix(".json")


def free_path(stem: Path) -> Path:
    """Return where a picture and its JSON can be saved without overwriting anything: `stem`, numbered if need be."""
    for number in itertools.count(1):
        path = stem.with_name(f"{stem.name}.png" if number == 1 else f"{stem.name}-{number}.png")
        if not path.exists() and not sidecar_path(path).exists():
            return path
    raise AssertionError("numbers do not end")


def save(result: Result, path: Path) -> Path:
    """Write a result's PNG to `path` and its JSON beside it, both or none; return the JSON's path.

    Raises:
        NotWritten: the disk is full, or the folder cannot be written to.
    """
    sidecar = sidecar_path(path)
    described = json.dumps(result.sidecar, indent=2, ensure_ascii=False) + "\n"
    # The PNG takes its place last: where it is, a batch that was killed takes the picture for done.
    write_together({path: result.png, sidecar: described.encode()})
    return sidecar


def read_picture(path: Path) -> Parameters:
    """Read the parameters of a picture: ours, or another program's as far as a request of ours has a place for them.

    Raises:
        RequestError: there is no such file, it is no picture, or it holds no parameters that can be read.
    """
    texts = embedded.texts(path)
    if REQUEST_CHUNK in texts:
        try:
            return _from_own_chunk(json_of(texts[REQUEST_CHUNK]))
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # a damaged chunk of ours: A1111's text may still be whole
    if (found := foreign.parse(texts)) is not None:
        return found
    text = "a PNG, JPEG or WebP with its parameters inside, from Z-Image Studio or one of {programs}"
    raise RequestError("file", path.name, Message("no_parameters", text, programs=list(PROGRAMS)))


def _from_own_chunk(chunk: Mapping[str, Any]) -> Parameters:
    fields, mode = dict(chunk["request"]), MODES.get(chunk["mode"], TextToImage)
    known = {name: finite(value) for name, value in fields.items() if name in mode.model_fields}
    rest = {name: shown(str(value)) for name, value in fields.items() if name not in known}
    fingerprints, inputs = dict(chunk["weights"]["fingerprints"]), dict(chunk.get("inputs", {}))
    return Parameters(REQUEST_CHUNK, str(chunk["mode"]), known, fingerprints, rest, inputs, str(chunk.get("app", "")))


def _quoted(value: Any) -> str:
    """Quote a value as A1111 does: as JSON, where a comma, colon or newline would split it."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text
