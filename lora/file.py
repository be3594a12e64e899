"""A LoRA file looked at before anything is loaded: what it is, what it would change, whether it may be used at all.

Reads the header alone, and the few bytes of its alphas. What cannot be used is refused with a sentence that names the
tensor, or the architecture that the file looks made for; what can be used gives a `lora.report.Report`. No file is
silently ignored: one that changes nothing is an error. `lora.dialects` understands the names of tensors.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex  # type: ignore[import-untyped]  # PEFT's patterns come from files: unlike `re`, it has a time limit

from core import bounded
from core.messages import Message
from core.request import Model
from core.sizes import WeightsKind
from hub.checkpoint import Header, UnusableError, parse_header, unreadable
from hub.naming import LAYER_SIZES, spellings
from lora import architectures, dialects, kinds
from lora.dialects import SCALED, BadLayerError, LayerKind, Parsed, Source, quoted
from lora.report import Report, clean, refused, some_of

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (ROOT / "loras", ROOT / "weights" / "mini" / "loras")  # the user's own, and the example

SUFFIX = ".safetensors"
CONFIG = "adapter_config.json"  # what PEFT writes beside the tensors: their alphas above all
USUAL_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # PEFT's and diffusers'
PEFT_PREFIX = "base_model.model."  # before the names that the trained model has itself
PEFT_KINDS = ("LORA", "LOHA", "LOKR")
# Ways to begin a training that change the model's own weights too, which such a file then counts on.
CHANGES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
MOST_PATTERNS, LONGEST_PATTERN, PATTERN_SECONDS = 2_000, 500, 2.0  # a name for every layer is 300
MAX_HEADER = 8_000_000  # bytes; every layer in every part is some 200 kB, a trainer's whole list of tags a few MB
MAX_FILE = 4 << 30  # bytes; rank 256 in every linear layer of Z-Image is 2.4 GB in bf16
# What numbers may be stored as; anything else is no LoRA's.
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_UNPACK = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b"}
_UNPACK |= {"U64": "<Q", "U32": "<I", "U16": "<H", "U8": "<B"}
_SCALED_TOO = {"I8"}  # what a scale makes numbers of besides
NUMBERS = ("alpha", "scalar")  # parts that are read with the header: a layer's scale comes of them
HASH_DIGITS = 12  # what galleries look up
MAX_CONFIG = 500_000  # characters of an entry of the metadata that alphas may be in; one for each layer is some 20 kB
MAX_SCALE = 10_000  # of a layer, alpha / rank: usual are 0.01 to 10, and fp16 ends at 65,504

_THIS_ONE = Message("this_file", "this one")
_CUT_SHORT = Message("cut_short", "cut short")


Ranks = Mapping[tuple[str, LayerKind | None], int | None]  # of a file's sources, by name and kind


@dataclass(frozen=True)
class Layer:
    """One source of a file with what the header says of it: its rank and alpha, None where it has none, and its scale.

    `scale` is alpha / rank (alpha / sqrt(rank) where the file says so), 1 without an alpha, times LyCORIS's scalar.
    """

    source: Source
    rank: int | None
    alpha: float | None
    scale: float


@dataclass(frozen=True)
class LoraFile:
    """A file that may be used: where it lies, its header, what it changes, the report, and PEFT's CONFIG beside it."""

    path: Path
    header: Header
    layers: tuple[Layer, ...]
    report: Report
    config: bytes = b""


def find(named: str) -> Path:
    """Return the file that a user names: a path, or a file's bare name in one of FOLDERS, with its ending or without.

    Instead of a file it may be a folder with one. What is nowhere is returned as it was named; reading it says so.
    """
    try:
        path = Path(named).expanduser()
        if not _holds(path) and path.name == named:
            inside = [folder / name for folder in FOLDERS for name in (named, named + SUFFIX)]
            return next((file for file in inside if _holds(file)), path)
    except (OSError, RuntimeError):  # longer than any file's name, or the home of nobody
        return Path(named)
    return path


def _holds(path: Path) -> bool:
    """Whether a path is a file, or a folder with a file that may be a LoRA."""
    return path.is_file() or (path.is_dir() and bool(_files(path)))


def _files(folder: Path) -> list[Path]:
    """Return the file of a folder that has one of USUAL_NAMES, or all that may be a LoRA."""
    usual = (folder / name for name in USUAL_NAMES)
    found = next(([file] for file in usual if file.is_file()), None)
    return found or sorted(file for file in folder.iterdir() if file.suffix.lower() == SUFFIX and file.is_file())


def read(path: Path) -> LoraFile:
    """Look at the header of a file, or of the one in a folder, and judge it.

    Raises:
        RequestError: there is no such file, it is not whole, it is no LoRA for Z-Image, or a layer of it is broken.
    """
    path, name = _in_folder(path)
    header, size = _header(path, name)
    config = _config_beside(path, name)
    if kind := kinds.not_applied(header.shapes):
        raise refused(name, "a LoRA for Z-Image; {what}", what=_of_kind(header, *kind))
    try:
        parsed = dialects.parse(header.tensors)
        known = [source for source in parsed.sources if source.targets]
        if not known:
            raise refused(name, "a LoRA for Z-Image; {what}", what=_what_else(header, parsed))
        for source in known:
            source.whole()  # also what only repeats another one
        used, repeats = dialects.without_repeats(known)
        fits, ranks = _fitting(used, header, name)
        declared = _declared_beside(config) if config else _declared_inside(header.metadata)
        layers = _layers(path, header, used, ranks, declared)
    except BadLayerError as problem:
        raise refused(name, "a LoRA for Z-Image whose layers are whole; {what}", what=problem.message) from None
    except (OSError, struct.error) as problem:  # it went away, or became shorter, since its header was read
        reason = problem.strerror if isinstance(problem, OSError) else _CUT_SHORT
        raise refused(name, "a file that can be read ({problem})", problem=reason) from None
    left_out = list(dict.fromkeys(source.name for source in parsed.sources if not source.targets)) + list(parsed.rest)
    return LoraFile(
        path,
        header,
        layers,
        Report(
            name=clean(name),
            bytes=size,
            dialect=_dialect(used),
            ranks=_bounds(layer.rank for layer in layers if layer.rank is not None),
            alphas=_bounds(layer.alpha for layer in layers if layer.rank is not None and layer.alpha is not None),
            size=fits,
            matched=tuple(dict.fromkeys(target for source in used for target in source.targets)),
            layers=len({source.name for source in used}) + len(left_out),
            left_out=tuple(clean(layer) for layer in left_out),
            repeats=tuple(dict.fromkeys(clean(source.name) for source in repeats)),
            text_encoder=tuple(clean(module) for module in parsed.text_encoder),
            base=_likely_base(header.metadata),
            trigger_words=_trigger_words(header.metadata),
            title=clean(header.metadata.get("modelspec.title") or header.metadata.get("ss_output_name") or ""),
            alpha_missing=any(_lacks_config(layer) for layer in layers),
        ),
        config,
    )


def _lacks_config(layer: Layer) -> bool:
    """Whether a layer is as PEFT writes it, with its alpha elsewhere."""
    return layer.alpha is None and layer.rank is not None and layer.source.name.startswith(PEFT_PREFIX)


def _in_folder(path: Path) -> tuple[Path, str]:
    """Return the file that is meant by a path, and how it is called: a folder with one file gives it its name.

    Raises:
        RequestError: the folder has none, or several.
    """
    try:
        if not path.is_dir():
            return path, path.stem
        found, name = _files(path), path.resolve().name
    except (OSError, ValueError):  # longer than any file's name, or with a zero in it
        return path, path.stem
    if len(found) != 1:
        wanted = "a folder with one .safetensors file in it; this one has {count}"
        raise refused(str(path), wanted, count=len(found))
    return found[0], name


def _config_beside(path: Path, name: str) -> bytes:
    """Return PEFT's configuration of a file, empty where there is none.

    Raises:
        RequestError: it cannot be read, or is longer than any trainer writes.
    """
    beside, usual = path.with_name(CONFIG), path.with_name(USUAL_NAMES[0])
    try:
        if not beside.is_file() or (path.name != usual.name and usual.is_file()):  # else it is that file's
            return b""
        with open(beside, "rb") as file:
            config = file.read(MAX_CONFIG + 1)
    except OSError as problem:
        text = "a LoRA whose {config} can be read ({problem})"
        raise refused(name, text, config=CONFIG, problem=problem.strerror) from None
    if len(config) > MAX_CONFIG:
        text = "a LoRA whose {config} has at most {limit:,} bytes"
        raise refused(name, text, config=CONFIG, limit=MAX_CONFIG)
    return config


def _header(path: Path, name: str) -> tuple[Header, int]:
    """Return the header and the file's length, refusing what is no whole LoRA-sized safetensors file."""
    wanted = Message("lora_file", "a .safetensors file of up to {size} GiB", size=MAX_FILE >> 30)
    try:
        if not path.is_file():
            raise refused(str(path), "{wanted} that exists", wanted=wanted)
        size = path.stat().st_size
        if size > MAX_FILE:
            raise refused(name, "{wanted}; this one has {size:.1f} GiB", wanted=wanted, size=size / (1 << 30))
        header = parse_header(path, MAX_HEADER)
    except UnusableError as error:
        raise refused(name, "{wanted}; {problem}", wanted=wanted, problem=error.of(_THIS_ONE)) from None
    except OSError as error:
        raise refused(name, "{wanted}; {problem}", wanted=wanted, problem=unreadable(_THIS_ONE, error)) from None
    return header, size


def _fitting(used: Sequence[Source], header: Header, name: str) -> tuple[WeightsKind, Ranks]:
    """Return the size that the shapes fit, and each source's rank.

    Raises:
        RequestError: they fit no size, and look like another architecture's.
        BadLayerError: they fit no size, or not all of them fit.
    """
    shapes = header.shapes
    found = {size: [dialects.misfits(source, size, shapes) for source in used] for size in LAYER_SIZES}
    # The size that most layers fit; where none does, the one with the fewest tensors amiss.
    size = min(found, key=lambda size: (sum(map(bool, found[size])), sum(map(len, found[size]))))
    problems = [problem for layer in found[size] for problem in layer]
    if all(found[size]) and (other := _other_kin(header)):
        raise refused(name, "a LoRA for Z-Image; {what}", what=_looks_like(other))
    if problems:
        raise problems[0]
    return size, {(source.name, source.kind): dialects.rank(source, shapes) for source in used}


def _layers(path: Path, header: Header, used: Sequence[Source], ranks: Ranks, declared: _Declared) -> tuple[Layer, ...]:
    """Add each source's scale, and check what its numbers are stored as."""
    layers = []
    with open(path, "rb") as file:
        for source in used:
            rank = ranks[source.name, source.kind]
            numbers = {part: _number(file, header, source.parts[part]) for part in NUMBERS if part in source.parts}
            for part, tensor in source.parts.items():
                possible = FLOATS | _SCALED_TOO if part + SCALED in source.parts else FLOATS
                if part not in NUMBERS and header.tensors[tensor].dtype not in possible:
                    text = "{tensor} is stored as {dtype}, not as floats"
                    raise BadLayerError(text, tensor=quoted(tensor), dtype=header.tensors[tensor].dtype)
            alpha = numbers.get("alpha")
            divisor = rank
            if alpha is None:
                alpha = declared.alpha(source)
                divisor = declared.rank(source, rank)
            scale = 1.0 if alpha is None or divisor is None else alpha / declared.root(source, divisor)
            scale *= numbers.get("scalar", 1.0)
            if not abs(scale) <= MAX_SCALE:  # also where it is no number
                text = "its alpha {alpha:g} is out of proportion to its rank {rank}: {layer}"
                raise BadLayerError(text, alpha=alpha, rank=divisor, layer=quoted(source.name))
            layers.append(Layer(source, rank, alpha, scale))
    return tuple(layers)


def _number(file: Any, header: Header, name: str) -> float:
    """Read a tensor that is a single number.

    Raises:
        BadLayerError: it is not one, or not finite.
    """
    tensor = header.tensors[name]
    file.seek(header.data_start + tensor.begin)
    data = file.read(tensor.end - tensor.begin)
    if tensor.dtype == "BF16":  # the upper half of an F32
        value: float = struct.unpack("<f", b"\0\0" + data)[0]
    elif tensor.dtype == "F8_E5M2":  # the upper half of an F16
        value = struct.unpack("<e", b"\0" + data)[0]
    elif tensor.dtype == "F8_E4M3":
        value = _e4m3(data[0])
    elif tensor.dtype in _UNPACK:
        value = float(struct.unpack(_UNPACK[tensor.dtype], data)[0])
    else:
        raise BadLayerError("{tensor} is stored as {dtype}, not as a number", tensor=quoted(name), dtype=tensor.dtype)
    if not math.isfinite(value):
        raise BadLayerError("{tensor} is {value}", tensor=quoted(name), value=value)
    return value


def _e4m3(byte: int) -> float:
    """Return the number that a byte is: 4 bits of exponent, 3 of mantissa, one NaN of either sign and no infinity."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    size = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if byte >> 7 else size


# --- what a file's metadata says ---------------------------------------------------------------------------------


Patterns = Callable[[str], float | None]  # the number that PEFT would give to a module, by its name


@dataclass(frozen=True)
class _Declared:
    """Alphas and ways to scale that are not in tensors; an alpha may be infinite or NaN.

    `usual_alpha` and `usual_rank` are of every module that `alphas` and `ranks` give no other; `beside` says that they
    are PEFT's, from a file of their own, and not from the metadata.
    """

    usual_alpha: float | None
    usual_rank: float | None
    alphas: Patterns
    ranks: Patterns
    square_root: bool
    beside: bool

    def alpha(self, source: Source) -> float | None:
        """Return the alpha of a source that brings none of its own."""
        if not self._means(source):
            return None
        found = self.alphas(self._named(source))
        return self.usual_alpha if found is None else found

    def rank(self, source: Source, own: int | None) -> int | None:
        """Return what the alpha of a source belongs to: its own rank, or for a LoKr of whole factors the declared one.

        Raises:
            BadLayerError: both are there and differ.
        """
        if not self.beside or not self._means(source):
            return own
        found = self.ranks(self._named(source))
        declared = self.usual_rank if found is None else found
        if own is not None and declared not in (None, own):
            text = "{config} beside it gives {layer} the rank {declared:g}, where its tensors have {rank}"
            raise BadLayerError(text, config=CONFIG, layer=quoted(source.name), declared=declared, rank=own)
        return own if own is not None or source.kind != "LoKr" or not declared else int(declared)

    def root(self, source: Source, rank: int) -> float:
        """Return what an alpha is divided by."""
        rooted = self.square_root and (not self.beside or source.kind == "LoRA")
        return math.sqrt(rank) if rooted else float(rank)

    def _means(self, source: Source) -> bool:
        """Whether a source is of a trainer that has its alphas there: kohya's write tensors, or none."""
        return not self.beside or source.kind != "LoRA" or "lora_A" in source.parts["down"].rpartition(source.name)[2]

    def _named(self, source: Source) -> str:
        """Return how the module was called when it was trained."""
        if self.beside and source.name.startswith(PEFT_PREFIX):
            return source.name.removeprefix(PEFT_PREFIX)
        return source.name.removeprefix(source.prefix)


def _declared_beside(config: bytes) -> _Declared:
    """Read PEFT's configuration.

    Raises:
        BadLayerError: it is none, or of a kind that is not applied.
    """
    try:
        found = bounded.loads(config.decode("utf-8-sig"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise BadLayerError("{config} beside it is no JSON object", config=CONFIG)
    kind = str(found.get("peft_type", PEFT_KINDS[0]))
    if kind.upper() not in PEFT_KINDS:
        text = "{config} beside it says that it is of the kind {kind}, which is not applied here"
        raise BadLayerError(text, config=CONFIG, kind=quoted(kind))
    alpha = "lora_alpha" if kind.upper() == "LORA" else "alpha"
    return _declared({alpha: 8, "r": 8} | found, alpha, beside=True)  # PEFT's own defaults


def _declared_inside(metadata: Mapping[str, str]) -> _Declared:
    """Read what diffusers writes on saving (`lora_adapter_metadata`) and what LyCORIS was called with.

    Raises:
        BadLayerError: they are longer than what a trainer writes.
    """
    for key in ("lora_adapter_metadata", "ss_network_args"):
        if len(metadata.get(key, "")) > MAX_CONFIG:
            raise BadLayerError("its metadata has more than {limit:,} characters of {key}", limit=MAX_CONFIG, key=key)
    config = {
        key.removeprefix("transformer."): value for key, value in _json(metadata, "lora_adapter_metadata").items()
    }
    trained_with = _json(metadata, "ss_network_args")
    if str(trained_with.get("rs_lora", "")).lower() == "true":
        config["use_rslora"] = True
    return _declared(config, "lora_alpha", beside=False)


def _declared(config: Mapping[str, Any], alpha: str, beside: bool) -> _Declared:
    """Return what a configuration of PEFT's says.

    Raises:
        BadLayerError: a number or a pattern of it is none, or it counts on changed weights of the model.
    """
    begun = str(config.get("init_lora_weights", "")).lower()
    if begun.startswith(CHANGES_WEIGHTS):
        text = (
            "its training began with {begun}, which changes the model's own weights too; PEFT can convert such a file"
        )
        raise BadLayerError(text, begun=quoted(begun))
    deadline = time.monotonic() + PATTERN_SECONDS
    return _Declared(
        _numeric(config, alpha),
        _numeric(config, "r"),
        _patterns(config.get("alpha_pattern"), "alpha_pattern", deadline),
        _patterns(config.get("rank_pattern"), "rank_pattern", deadline),
        bool(config.get("use_rslora")),
        beside,
    )


def _numeric(config: Mapping[str, Any], name: str) -> float | None:
    value = config.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadLayerError("its {name} is {value}, not a number", name=name, value=quoted(str(value)))
    return float(value)


def _patterns(given: Any, name: str, deadline: float) -> Patterns:
    """Return what gives a module the number of the first pattern that is its whole name or the end after a dot.

    That is PEFT's rule (`get_pattern_key`): patterns are regular expressions.

    Args:
        given: numbers by pattern.
        name: what the sentence on a bad one calls them.
        deadline: when looking has taken too long, by the monotonic clock.
    """
    given = given if isinstance(given, dict) else {}
    if len(given) > MOST_PATTERNS or any(len(pattern) > LONGEST_PATTERN for pattern in given):
        text = "its {name} has more than {limit:,} patterns, or one of more than {longest} characters"
        raise BadLayerError(text, name=name, limit=MOST_PATTERNS, longest=LONGEST_PATTERN)
    compiled = []
    for pattern in given:
        try:
            compiled.append((regex.compile(rf"(.*\.)?({pattern})$"), _numeric(given, pattern)))
        except (regex.error, OverflowError, RecursionError):
            text = "its {name} has {pattern}, which is no regular expression"
            raise BadLayerError(text, name=name, pattern=quoted(pattern)) from None

    def first(module: str) -> float | None:
        try:
            for pattern, number in compiled:
                if pattern.match(module, timeout=max(1e-3, deadline - time.monotonic())):
                    return number
        except TimeoutError:
            raise BadLayerError("its {name} takes too long to be compared", name=name) from None
        return None

    return first


def _json(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """Return an entry of the metadata that is a JSON object; anything else is an empty one."""
    try:
        found = bounded.loads(metadata.get(key, "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


_BASE_KEYS = (
    *("ss_base_model_version", "ss_sd_model_name", "modelspec.architecture", "modelspec.implementation", "base_model"),
    *("base_model_name_or_path", "ss_pretrained_model_name_or_path", "model_name_or_path", "modelspec.usage_hint"),
)


def _likely_base(metadata: Mapping[str, str]) -> Model | None:
    """Return the model that the metadata names; a bare "Z-Image" may be either, since trainers write it for both."""
    config = _json(metadata, "lora_adapter_metadata")
    texts = [metadata.get(key, "") for key in _BASE_KEYS]
    texts += [str(value) for key, value in config.items() if key.endswith("base_model_name_or_path")]
    text = "\n".join(texts).lower()
    if "turbo" in text:
        return "turbo"
    return "base" if re.search(r"z[-_ ]?image[-_ ]?base|tongyi-mai/z-image$", text, re.MULTILINE) else None


_TRIGGER_KEYS = (
    *("modelspec.trigger_phrase", "ss_trigger_words", "trigger_words", "trigger_word", "trigger_phrase"),
    *("instance_prompt", "activation_text", "trigger"),
)
MOST_TRIGGERS, LONGEST_TRIGGER = 12, 80
LONGEST_LIST = 20_000  # characters of an entry with trigger words; what is longer is something else


def _trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return the words that the metadata gives; those that every training image was tagged with count too."""
    found: list[str] = []
    for key in _TRIGGER_KEYS:
        text = metadata.get(key, "")
        if len(text) > LONGEST_LIST:
            continue
        try:
            listed = bounded.loads(text)
        except ValueError:
            listed = None
        found += [str(word) for word in listed] if isinstance(listed, list) else text.split(",")
    images = _natural(metadata.get("ss_num_train_images", ""))
    if images and not any(word.strip() for word in found):
        counts: Counter[str] = Counter()
        for tags in _json(metadata, "ss_tag_frequency").values():
            if isinstance(tags, dict):
                counts.update({str(tag): n for tag, n in tags.items() if type(n) is int and n > 0})
        found = [tag for tag, count in counts.most_common(MOST_TRIGGERS) if count >= images]
    words = (clean(word) for word in found)
    return tuple(dict.fromkeys(word for word in words if 0 < len(word) <= LONGEST_TRIGGER))[:MOST_TRIGGERS]


def _natural(text: str) -> int:
    """Return a number that is written as digits; 0 where it is none, or none that is possible."""
    return int(text) if text.isdecimal() and len(text) <= bounded.MAX_DIGITS else 0


# --- what else a file may be -------------------------------------------------------------------------------------


def _other_kin(header: Header) -> Message | None:
    """Return an architecture that only shapes or metadata tell."""
    if by_width := architectures.by_width(header.shapes):
        return by_width
    claimed = architectures.claimed(header.metadata)
    return Message("claimed", '"{name}", as its metadata says', name=clean(claimed)) if claimed else None


def _of_kind(header: Header, kind: Message, tensor: str) -> Message:
    if other := architectures.by_names(header.shapes):
        return Message("not_applied", "this looks like one for {other}, of the kind {kind}", other=other, kind=kind)
    text = "this one is of the kind {kind}, which is not applied here ({tensor})"
    return Message("not_applied", text, kind=kind, tensor=quoted(tensor))


def _looks_like(architecture: Message) -> Message:
    return Message("other_architecture", "this looks like one for {other}", other=architecture)


def _what_else(header: Header, parsed: Parsed) -> Message:
    """Return what a file is that has no layer for Z-Image's transformer."""
    names = header.tensors
    if not names:
        return Message("empty", "this file is empty")
    other = architectures.by_names(header.shapes) or _other_kin(header)
    if not parsed.any_layers:
        return _without_lora(names, other)
    if other is not None:
        return _looks_like(other)
    if not parsed.sources:
        text = "this one is for a text encoder alone ({layers} layers)"
        return Message("text_encoder_alone", text, layers=len(parsed.text_encoder))
    layers = list(dict.fromkeys(source.name for source in parsed.sources))
    if all(map(kinds.is_controlnets, layers)):
        return Message(
            "controlnet", "this one is for a ControlNet, not for Z-Image itself ({names})", names=some_of(layers)
        )
    text = "none of its {layers} layers matches ({names})"
    return Message("no_match", text, layers=len(layers), names=some_of(layers))


def _without_lora(names: Iterable[str], other: Message | None) -> Message:
    if other is not None:
        text = "this file has no LoRA in it; its tensors look like {other} (for example {names})"
        return Message("no_lora", text, other=other, names=some_of(names))
    if any(spellings("full").get(_module(name)) for name in names):
        return Message("whole_transformer", "this is a whole transformer, not a LoRA")
    return Message("no_lora", "this file has no LoRA in it (for example {names})", names=some_of(names))


def _module(tensor: str) -> str:
    for prefix in ("model.diffusion_model.", "diffusion_model.", "transformer.", "dit."):
        tensor = tensor.removeprefix(prefix)
    return tensor.rpartition(".")[0].replace(".", "_")


# --- for people --------------------------------------------------------------------------------------------------


def _dialect(used: Sequence[Source]) -> str:
    """Describe how a file is written: its kinds, the names of the pairs, what stands before a module's name."""
    kinds = Counter(str(source.kind) + (" with DoRA" if "magnitude" in source.parts else "") for source in used)
    pairs = dict.fromkeys(source.pair for source in used if source.kind == "LoRA")
    prefixes = dict.fromkeys(source.prefix for source in used)
    described = [" and ".join(kind for kind, _ in kinds.most_common())]
    described += [f"names {' and '.join(pairs)}"] if pairs else []
    described.append("prefix " + " and ".join(clean(prefix) or "none" for prefix in prefixes))
    described += ["fused qkv"] if any(source.fused for source in used) else []
    return ", ".join(described)


def _bounds(values: Iterable[Any]) -> tuple[Any, Any] | None:
    values = list(values)
    return (min(values), max(values)) if values else None


# --- identity ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """What tells one LoRA from another: `digest` of the whole file, `hash` as galleries write it (12 hex digits).

    Where PEFT's CONFIG lies beside the file, `digest` is of both, one after the other.
    """

    digest: str
    hash: str


def identify(file: LoraFile) -> Identity:
    """Read the file once and return who it is.

    The short hash is what trainers put into the metadata (`sshs_model_hash`), else the SHA-256 of the tensors' data.

    Raises:
        RequestError: the file cannot be read any more, or has changed since its header was read.
    """
    whole, data = hashlib.sha256(), hashlib.sha256()
    try:
        with open(file.path, "rb") as stream:
            whole.update(stream.read(file.header.data_start))
            read = file.header.data_start
            while block := stream.read(1 << 20):
                whole.update(block)
                data.update(block)
                read += len(block)
        whole.update(file.config)
    except OSError as problem:
        raise refused(file.report.name, "a file that can be read ({problem})", problem=problem.strerror) from None
    if read != file.report.bytes:
        raise refused(file.report.name, "a file that nobody changes meanwhile")
    claimed = file.header.metadata.get("sshs_model_hash", "").lower().removeprefix("0x")
    short = claimed if re.fullmatch("[0-9a-f]{12,64}", claimed) else data.hexdigest()
    return Identity(whole.hexdigest(), short[:HASH_DIGITS])
