"""The names that trainers write into LoRA files, translated to the names of DiffSynth's Z-Image transformer.

A file's tensors are grouped into sources: one module as the file spells it, with its parts ("down", "up", "alpha", ...)
and the one module of the transformer that it changes (three, for a fused qkv). Works on names and shapes alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from core.messages import Message
from core.sizes import WeightsKind
from hub.checkpoint import UnusableError
from hub.naming import LAYER_SIZES, Shape, flat, spellings, weight_shapes

LONGEST_QUOTE = 120  # characters of a name in a sentence
LayerKind = Literal["LoRA", "LoKr", "LoHa", "difference"]


class BadLayerError(UnusableError):
    """A layer of the file cannot be used as it stands; the message names the tensor."""


def quoted(name: str) -> str:
    """Return a name from a file as a sentence quotes it: without control characters, and not too long."""
    text = repr(name)
    return text if len(text) <= LONGEST_QUOTE else text[: LONGEST_QUOTE - 3] + "..."


# --- a file's names ----------------------------------------------------------------------------------------------

_PREFIXES = (
    *("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "dit.", "_orig_mod."),
    # dots written as underscores: kohya's trainers (ComfyUI's merges have two), and LyCORIS's
    *("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_"),
)
_FLAT_PREFIXES = ("base_model_model_", "model_diffusion_model_", "diffusion_model_", "transformer_", "dit_", "_")


def _one_of(prefixes: Iterable[str]) -> str:
    """Return an expression for one of some prefixes, where some name is left over after it."""
    return f"(?:(?:{'|'.join(re.escape(prefix) for prefix in prefixes)})(?=.))"


# However many are piled up: those with dots, then one with underscores and more of their kind.
_PILED = re.compile(
    _one_of(prefix for prefix in _PREFIXES if not prefix.endswith("_"))
    + f"*(?:{_one_of(prefix for prefix in _PREFIXES if prefix.endswith('_'))}{_one_of(_FLAT_PREFIXES)}*)?",
    re.DOTALL,
)
_TEXT_ENCODER = re.compile(
    r"(base_model\.model\.)?(text_encoders?(_\d)?\.|text_model\.|conditioner\.|cond_stage_model\.|te\d?\.|clip_[lg]\.|qwen3\w*\.)"
    r"|(lora|lycoris)_(te|text_encoder)\d?_"
)

# The end of a tensor's name -> its part. An adapter's name ("default") may stand before ".weight".
_PART = re.compile(
    r"^(?P<module>.+?)\.(?:"
    r"(?P<pair>lora_A|lora_B|lora_down|lora_up|lora_mid|lora\.down|lora\.up|lora_linear_layer\.down|lora_linear_layer\.up)"
    r"(?:\.(?!weight|bias)[\w-]+)?(?P<what>\.weight|\.bias)?"
    r"|(?P<magnitude>dora_scale|lora_magnitude_vector(?:\.[\w-]++)*)"
    r"|(?P<other>alpha|lokr_w[12](?:_[ab])?|lokr_t[12]|hada_w[12]_[ab]|hada_t[12]|diff|diff_b|w_norm|b_norm|scalar)"
    r")$"
)
_OTHER = {"w_norm": "diff", "b_norm": "diff_b"}
_NEEDED: Mapping[LayerKind, tuple[tuple[tuple[str, ...], ...], ...]] = {
    # one choice of each row has to be there
    "LoRA": ((("down", "up"),),),
    "LoKr": ((("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")), (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))),
    "LoHa": ((("hada_w1_a", "hada_w1_b"),), (("hada_w2_a", "hada_w2_b"),)),
    "difference": ((("diff",), ("diff_b",)),),
}
_BESIDE = {"alpha", "magnitude"}  # parts that any kind may have
MOST_DOTS = 32


@dataclass(frozen=True)
class Source:
    """One module as the file spells it.

    `name` is the spelling, `prefix` what of it is no part of the module's own name; `targets` are the transformer's
    modules that it changes, none where there is no such module; `parts` are the names of its tensors, by what they are.
    """

    name: str
    prefix: str
    targets: tuple[str, ...]
    parts: Mapping[str, str]

    @property
    def fused(self) -> bool:
        """Whether it changes several modules as one: its rows are theirs, one after the other."""
        return len(self.targets) > 1

    @property
    def kind(self) -> LayerKind:
        """What its tensors make.

        Raises:
            BadLayerError: they make nothing whole, or two things at once.
        """
        kinds = {_kind_of(part) for part in self.parts if part not in _BESIDE}
        some = next(iter(self.parts.values()))
        if None in kinds:
            odd = next(tensor for part, tensor in self.parts.items() if part not in _BESIDE and not _kind_of(part))
            raise BadLayerError("{tensor} is of a kind that no linear layer takes", tensor=quoted(odd))
        if not kinds:
            text = "{tensors} are there without the tensors that they scale"
            raise BadLayerError(text, tensors=_listed(self.parts.values()))
        if len(kinds) > 1:
            raise BadLayerError("{tensors} belong to more than one kind of LoRA", tensors=_listed(self.parts.values()))
        (kind,) = kinds
        assert kind is not None  # that was refused above
        for choices in _NEEDED[kind]:
            whole = [choice for choice in choices if set(choice) <= set(self.parts)]
            begun = [choice for choice in choices if set(choice) & set(self.parts)]
            if kind == "difference" and whole:
                continue
            if len(whole) != 1 or len(begun) > 1:
                there = next((tensor for choice in begun for part in choice if (tensor := self.parts.get(part))), some)
                text = "{tensor} is there in two forms" if whole else "{tensor} has no counterpart"
                raise BadLayerError(text, tensor=quoted(there))
        return kind

    @property
    def pair(self) -> str:
        """How the file names its parts, for people."""
        names = [tensor.removeprefix(self.name + ".") for part, tensor in self.parts.items() if part not in _BESIDE]
        return "/".join(sorted(name.removesuffix(".weight") for name in names))


def _kind_of(part: str) -> LayerKind | None:
    if part in ("down", "up", "up_bias"):
        return "LoRA"
    if part.startswith("lokr_w"):
        return "LoKr"
    if part.startswith("hada_w"):
        return "LoHa"
    return "difference" if part in ("diff", "diff_b") else None


def _listed(names: Iterable[str]) -> Message | list[str]:
    names = sorted(names)
    shown = [quoted(name) for name in names[:3]]
    return Message("names", "{names} and others", names=shown) if len(names) > 3 else shown


@dataclass(frozen=True)
class Parsed:
    """A file's tensors, sorted: `sources` for the transformer, `text_encoder` by module, `rest` as they are."""

    sources: tuple[Source, ...]
    text_encoder: tuple[str, ...]
    rest: tuple[str, ...]

    @property
    def any_layers(self) -> bool:
        """Whether anything in the file is named like a LoRA's tensor."""
        return bool(self.sources or self.text_encoder)


def parse(tensors: Iterable[str]) -> Parsed:
    """Sort a file's tensors by name.

    Raises:
        BadLayerError: two tensors claim the same part of the same module.
    """
    modules: dict[str, dict[str, str]] = {}
    rest = []
    for tensor in tensors:
        match = _PART.match(tensor)
        if match is None:
            rest.append(tensor)
            continue
        parts = modules.setdefault(match["module"], {})
        part = _part(match)
        if part in parts:
            text = "{tensor} and {other} are the same part of one layer"
            raise BadLayerError(text, tensor=quoted(tensor), other=quoted(parts[part]))
        parts[part] = tensor
    sources, encoder = [], []
    for name, parts in modules.items():
        if _TEXT_ENCODER.match(name):
            encoder.append(name)
            continue
        prefix = _prefix(name)
        # The full size has every name that the miniature has.
        targets = spellings("full").get(flat(name.removeprefix(prefix)), ())
        sources.append(Source(name, prefix, targets, parts))
    known = {source.name for source in sources if source.targets}
    for tensor in rest:
        if not known.isdisjoint(_above(tensor)):
            raise BadLayerError("{tensor} is a part of a layer that is not known here", tensor=quoted(tensor))
    return Parsed(tuple(sources), tuple(encoder), tuple(rest))


def _above(tensor: str) -> Iterator[str]:
    """Yield the names of the modules that a tensor may belong to; none of ours has as many dots as MOST_DOTS."""
    for dot in islice(re.finditer(r"\.", tensor), MOST_DOTS):
        yield tensor[: dot.start()]


def _part(match: re.Match[str]) -> str:
    if match["magnitude"]:
        return "magnitude"
    if match["other"]:
        return _OTHER.get(match["other"], match["other"])
    pair = match["pair"]
    side = "down" if pair.endswith(("_A", "down")) else "up" if pair.endswith(("_B", "up")) else "mid"
    return side if match["what"] != ".bias" else side + "_bias"


def _prefix(name: str) -> str:
    """Return what stands before the module's own name."""
    found = _PILED.match(name)
    assert found is not None  # it matches an empty string too
    return found[0]


def without_repeats(sources: Iterable[Source]) -> tuple[list[Source], list[Source]]:
    """Part sources into those to use and those that only repeat others: a fused qkv beside its three parts.

    Raises:
        BadLayerError: two sources change the same module, and neither is a fused form of the other.
    """
    sources = list(sources)
    single = {source.targets[0]: source for source in sources if len(source.targets) == 1}
    used: list[Source] = []
    repeats: list[Source] = []
    taken: dict[str, Source] = {}
    for source in sources:
        if source.fused and all(target in single for target in source.targets):
            repeats.append(source)
            continue
        for target in source.targets:
            if target in taken:
                text = "{layer} and {other} both change {module}"
                other = quoted(taken[target].name)
                raise BadLayerError(text, layer=quoted(source.name), other=other, module=target)
            taken[target] = source
        used.append(source)
    return used, repeats


# --- shapes ------------------------------------------------------------------------------------------------------


def target_shape(source: Source, size: WeightsKind) -> Shape:
    """Return the shape of the weight that a source changes: of a fused one, its modules' rows together.

    Raises:
        BadLayerError: that size has no such module.
    """
    shapes = weight_shapes(size)
    if not all(target in shapes for target in source.targets):
        text = "{layer} has no place in {model}"
        raise BadLayerError(text, layer=quoted(source.name), model=LAYER_SIZES[size].title)
    rows, *columns = shapes[source.targets[0]]
    return (rows * len(source.targets), *columns)


def matrix(shape: Shape) -> Shape:
    """Return a shape without the ones at its end: some trainers write a linear layer as a 1 x 1 convolution."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def misfits(source: Source, size: WeightsKind, shapes: Mapping[str, Shape]) -> list[BadLayerError]:
    """Return what is wrong with the shapes of a source's tensors, one error a tensor, naming it and both shapes.

    Raises:
        BadLayerError: its tensors make nothing whole.
    """
    kind = source.kind
    try:
        whole = target_shape(source, size)
    except BadLayerError as absent:
        return [absent]
    has = {part: matrix(shapes[tensor]) for part, tensor in source.parts.items()}
    return [
        BadLayerError(
            "{tensor} is {shape}, where {model} takes {wanted}",
            tensor=quoted(source.parts[part]),
            shape=_written(shape),
            model=LAYER_SIZES[size].title,
            wanted=_written(wanted),
        )
        for part, shape, wanted in _wanted(kind, whole, has)
        if shape != wanted
    ]


def rank(source: Source, shapes: Mapping[str, Shape]) -> int | None:
    """Return the rank of a source whose shapes fit, None where it has none."""
    # LoKr as LyCORIS counts: both factors have the same rank where both have one.
    parts = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    return next((shapes[source.parts[part]][0] for part in parts if part in source.parts), None)


def _written(shape: Shape) -> Message | str:
    return " x ".join(map(str, shape)) or Message("single_number", "a single number")


def _wanted(kind: LayerKind, whole: Shape, has: Mapping[str, Shape]) -> Iterator[tuple[str, Shape, Shape]]:
    """Yield (part, its shape, the shape it must have)."""
    rows, columns = whole[0], whole[1] if len(whole) > 1 else 0
    if kind != "difference" and not columns:
        # a norm's weight is no matrix
        yield from ((part, shape, whole) for part, shape in has.items() if part not in _BESIDE)
    if "alpha" in has:
        yield "alpha", has["alpha"] if math.prod(has["alpha"]) != 1 else (), ()
    if "magnitude" in has:
        shape = has["magnitude"]
        yield "magnitude", shape, shape if shape in ((rows,), (rows, 1), (1, columns)) else (rows, 1)
    if kind == "LoRA":
        rank = max(1, has["down"][0] if has["down"] else 0)
        yield "down", has["down"], (rank, columns)
        yield "up", has["up"], (rows, rank)
        if "up_bias" in has:
            yield "up_bias", has["up_bias"], (rows,)
    elif kind == "LoHa":
        for factor in ("hada_w1", "hada_w2"):
            rank = max(1, has[factor + "_b"][0] if has[factor + "_b"] else 0)
            yield factor + "_a", has[factor + "_a"], (rows, rank)
            yield factor + "_b", has[factor + "_b"], (rank, columns)
    elif kind == "LoKr":
        yield from _wanted_lokr(rows, columns, has)
    else:
        if "diff" in has:
            yield "diff", has["diff"], whole
        if "diff_b" in has:  # no norm here has a bias
            yield "diff_b", has["diff_b"], (rows,) if columns else (0,)


def _wanted_lokr(rows: int, columns: int, has: Mapping[str, Shape]) -> Iterator[tuple[str, Shape, Shape]]:
    sides = []
    for factor in ("lokr_w1", "lokr_w2"):
        parts = [part for part in (factor, factor + "_a", factor + "_b") if part in has]
        for part in parts:
            if len(has[part]) != 2 or 0 in has[part]:
                yield part, has[part], (rows, columns)
                return
        left, right = has[parts[0]], has[parts[-1]]
        if len(parts) == 2:
            yield parts[1], right, (left[1], right[1])
        sides.append((left[0], right[1]))
    (a, b), (c, d) = sides
    if (a * c, b * d) != (rows, columns):
        # Not a matter of one tensor alone: the product of both is what has to fit.
        yield parts[0], (a * c, b * d), (rows, columns)
