"""The names that trainers write into LoRA files, translated to the names of DiffSynth's Z-Image transformer.

A file's tensors are grouped into sources: one module as the file spells it, with the parts of one kind of change to it
("down", "up", "alpha", ...) and the one module of the transformer that it changes (three, for a fused qkv). Whatever
stands before a module's name is a prefix. Works on names and shapes alone.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
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

# What a framework wraps modules in, wherever in a name: torch.compile, FSDP, DDP, PEFT, diffusers' old processors.
_WRAPPERS = re.compile(
    r"(?:(?<=[._])|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|processor|module|model)"
    r"(?:[._]|$)|(?<=\.)_\w+?(?:\.|$)"
)
# Words before a module's name that make it another network's: the ControlNet and text encoders have such modules too.
_ELSEWHERE = re.compile(
    r"(?:^|[._])(?:control\w*?|layers?|blocks?|refiner|attention|attn|embedder|siglip|llm|encoders?|decoder)(?=[._])"
)
_TEXT_ENCODER = re.compile(
    r"(?:^|[._])(?:text_encoders?(?:_\d)?|text_model|conditioner|cond_stage_model|clip_[lg]|qwen3\w*?)[._]"
    r"|^(?:(?:lora|lycoris)_)?te\d?[._]"
    r"|(?:^|[._])layers[._]\d+[._](?:self_attn|mlp)[._](?:[qkvo]|gate|up|down)_proj$"
)

# The end of a tensor's name -> its part. An adapter's name ("default") may stand in it, and at its end what says that
# the tensor is the scale of fp8 numbers, or something of theirs that only computing in fp8 needs.
_PART = re.compile(
    r"^(?P<module>.+?)(?:\.|_(?=lora\.))(?:"
    r"(?P<pair>lora_[AaBb]|lora_down|lora_up|lora_mid|lora\.down|lora\.up|lora_linear_layer\.down|lora_linear_layer\.up)"
    r"|(?P<magnitude>dora_scale|lora_magnitude_vector)"
    r"|(?P<other>alpha|scalar|lokr_w[12](?:_[ab])?|lokr_t[12]|hada_w[12]_[ab]|hada_t[12]|diff|diff_b|w_norm|b_norm)"
    r")(?:\.(?P<adapter>(?!(?:weight|bias|scale|input_scale|comfy_quant)(?:[._]|$))[\w-]+))?"
    r"(?:\.(?P<what>weight|bias))?"
    r"(?:(?P<scale>[._]+(?:fp8_)?scale(?:_weight|_inv)?)|(?P<ignored>[._](?:input_scale|scale_input|comfy_quant)))?$"
)
_MARKER = re.compile(r"(?:^|\.)scaled_fp8$")  # ComfyUI's, once in a file
SCALED = "_scale"  # the end of the part that another part is multiplied by
_KINDS: Mapping[str, LayerKind] = {"lora": "LoRA", "lokr": "LoKr", "hada": "LoHa"}
_NEEDED: Mapping[LayerKind, tuple[tuple[tuple[str, ...], ...], ...]] = {
    # one choice of each row has to be there
    "LoRA": ((("down", "up"),),),
    "LoKr": ((("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")), (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))),
    "LoHa": ((("hada_w1_a", "hada_w1_b"),), (("hada_w2_a", "hada_w2_b"),)),
    "difference": ((("diff",), ("diff_b",)),),
}
_BESIDE = {"alpha", "magnitude", "scalar"}  # parts that belong to a layer, however its tensors are called
MOST_DOTS = 32
LONGEST_MODULE = 200  # characters of a module's own name with what wraps its parts; the longest has 42 without


@dataclass(frozen=True)
class Source:
    """One module as the file spells it, with one kind of change to it.

    `name` is the spelling, `prefix` what of it is no part of the module's own name; `targets` are the transformer's
    modules that it changes, none where there is no such module; `kind` is what its tensors make, None where only what
    belongs to some kind is there; `parts` are the names of its tensors, by what they are.
    """

    name: str
    prefix: str
    targets: tuple[str, ...]
    kind: LayerKind | None
    parts: Mapping[str, str]

    @property
    def fused(self) -> bool:
        """Whether it changes several modules as one: its rows are theirs, one after the other."""
        return len(self.targets) > 1

    @property
    def claims(self) -> set[tuple[str, str]]:
        """What only one source may do: to each module its kind of change, or of differences each one."""
        what = set(self.parts) & {"diff", "diff_b"} if self.kind == "difference" else {str(self.kind)}
        what |= {"magnitude"} & set(self.parts)
        return {(target, claim) for target in self.targets for claim in what}

    def whole(self) -> LayerKind:
        """Return its kind, where its tensors make something whole.

        Raises:
            BadLayerError: they do not.
        """
        if self.kind is None:
            text = "{tensors} are there without the tensors that they scale"
            raise BadLayerError(text, tensors=_listed(self.parts.values()))
        possible = {part for choices in _NEEDED[self.kind] for choice in choices for part in choice} | {"magnitude"}
        possible |= {"up_bias"} if self.kind == "LoRA" else set()
        numbers = {"alpha"} if self.kind == "difference" else {"alpha", "scalar"}  # which nothing scales
        for part, tensor in self.parts.items():
            if part not in numbers and part.removesuffix(SCALED) not in possible:
                raise BadLayerError("{tensor} is of a kind that no linear layer takes", tensor=quoted(tensor))
            if part.endswith(SCALED) and part.removesuffix(SCALED) not in self.parts:
                raise BadLayerError("{tensor} has no counterpart", tensor=quoted(tensor))
        some = next(iter(self.parts.values()))
        for choices in _NEEDED[self.kind]:
            whole = [choice for choice in choices if set(choice) <= set(self.parts)]
            begun = [choice for choice in choices if set(choice) & set(self.parts)]
            if self.kind == "difference" and whole:
                continue
            if len(whole) != 1 or len(begun) > 1:
                there = next((self.parts[part] for choice in begun for part in choice if part in self.parts), some)
                text = "{tensor} is there in two forms" if whole else "{tensor} has no counterpart"
                raise BadLayerError(text, tensor=quoted(there))
        return self.kind

    @property
    def pair(self) -> str:
        """How the file names its parts, for people."""
        own = {part: tensor for part, tensor in self.parts.items() if part not in _BESIDE and SCALED not in part}
        names = [tensor.removeprefix(self.name)[1:] for tensor in own.values()]
        return "/".join(sorted(name.removesuffix(".weight") for name in names))


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


_Writing = tuple[LayerKind | None, str, str]  # a kind, how its parts are called, and the adapter's name


def parse(tensors: Iterable[str]) -> Parsed:
    """Sort a file's tensors by name.

    Raises:
        BadLayerError: two tensors claim the same part of the same module, or one may belong to two kinds.
    """
    modules: dict[str, dict[_Writing, dict[str, str]]] = {}
    rest = []
    for tensor in tensors:
        match = _PART.match(tensor)
        if match is None:
            rest += [] if _MARKER.search(tensor) else [tensor]
            continue
        writings = modules.setdefault(match["module"], {})
        if match["ignored"]:
            continue
        part, writing = _part(match)
        parts = writings.setdefault(writing, {})
        if part in parts:
            text = "{tensor} and {other} are the same part of one layer"
            raise BadLayerError(text, tensor=quoted(tensor), other=quoted(parts[part]))
        parts[part] = tensor
    sources: list[Source] = []
    encoder = []
    for name, writings in modules.items():
        prefix, targets = _located(name)
        if not targets and _TEXT_ENCODER.search(name):
            encoder.append(name)
            continue
        sources += [Source(name, prefix, targets, kind, parts) for kind, parts in _kinds(writings)]
    known = {source.name for source in sources if source.targets}
    for tensor in rest:
        if not known.isdisjoint(_above(tensor)):
            raise BadLayerError("{tensor} is a part of a layer that is not known here", tensor=quoted(tensor))
    return Parsed(tuple(sources), tuple(encoder), tuple(rest))


def _above(tensor: str) -> Iterator[str]:
    """Yield the names of the modules that a tensor may belong to; none of ours has as many dots as MOST_DOTS."""
    for dot in islice(re.finditer(r"\.", tensor), MOST_DOTS):
        yield tensor[: dot.start()]


def _part(match: re.Match[str]) -> tuple[str, _Writing]:
    """Return what a tensor is, and how it is written: parts that are written alike belong together."""
    adapter, scaled = match["adapter"] or "", SCALED if match["scale"] else ""
    if match["magnitude"]:
        return "magnitude" + scaled, (None, "", "")
    if other := match["other"]:
        if other in _BESIDE:
            return other + scaled, (None, "", "")
        named = {"w_norm": "diff", "b_norm": "diff_b"}.get(other, other)
        return named + scaled, (_KINDS.get(other[:4], "difference"), "norm" if named != other else "", adapter)
    pair = match["pair"]
    side = "down" if pair.lower().endswith(("_a", "down")) else "up" if pair.lower().endswith(("_b", "up")) else "mid"
    written = pair.removesuffix(side) if pair.endswith(side) else f"{pair[:-1]}{'ab' if pair[-1].islower() else 'AB'}"
    return (side if match["what"] != "bias" else side + "_bias") + scaled, ("LoRA", written, adapter)


def _kinds(writings: Mapping[_Writing, Mapping[str, str]]) -> Iterator[tuple[LayerKind | None, Mapping[str, str]]]:
    """Yield each kind of a module's parts, with what belongs to it: an alpha and magnitudes are no difference's.

    Raises:
        BadLayerError: magnitudes may belong to either of two kinds.
    """
    beside = writings.get((None, "", ""), {})
    written = [(kind, parts) for (kind, *_), parts in writings.items() if kind is not None]
    factored = {kind for kind, _ in written if kind != "difference"}
    if "magnitude" in beside and len(factored) > 1:
        text = "{tensor} may belong to either of two kinds of one layer"
        raise BadLayerError(text, tensor=quoted(beside["magnitude"]))
    if not written and beside:
        yield None, beside
    for kind, parts in written:
        yield kind, {**parts, **(beside if kind in factored or not factored else {})}


@cache
def _first_words() -> re.Pattern[str]:
    """Return an expression for where the name of one of the transformer's modules may begin."""
    words = sorted({name.split("_")[0] for name in spellings("full")})
    return re.compile(rf"(?:^|(?<=[._]))(?=(?:{'|'.join(words)})[._])")


def _located(name: str) -> tuple[str, tuple[str, ...]]:
    """Return what stands before a module's own name, and the transformer's modules that this is; none if it is none.

    The own name is the longest end of the name that the transformer has, so that any prefix will do.
    """
    known = spellings("full")  # every name that the miniature has, too
    for start in _first_words().finditer(name, max(0, len(name) - LONGEST_MODULE)):
        prefix, own = name[: start.start()], name[start.start() :]
        if targets := known.get(flat(own)) or known.get(flat(_WRAPPERS.sub("", own).rstrip("._"))):
            elsewhere = _ELSEWHERE.search(prefix) or _TEXT_ENCODER.search(prefix)
            return ("", ()) if elsewhere else (prefix, targets)
    return "", ()


def without_repeats(sources: Iterable[Source]) -> tuple[list[Source], list[Source]]:
    """Part sources into those to use and those that change again what another one changes in the same way.

    A fused qkv gives way to its three parts where they are all there; else what is written as most of the file is comes
    first, and what comes first in the file. What a layer has of several kinds are no repeats: all of it is applied.
    """
    sources = list(sources)
    single = {(source.targets[0], source.kind) for source in sources if not source.fused}
    fused = {(target, source.kind) for source in sources if source.fused for target in source.targets}
    common = Counter(source.prefix for source in sources)

    def rank(source: Source) -> tuple[bool, int]:
        if source.fused:
            gives_way = all((target, source.kind) in single for target in source.targets)
        else:
            block = source.targets[0].rpartition(".")[0]
            three = {(f"{block}.to_{letter}", source.kind) for letter in "qkv"}
            gives_way = (source.targets[0], source.kind) in fused and not three <= single
        return gives_way, -common[source.prefix]

    used: set[int] = set()
    taken: set[tuple[str, str]] = set()
    for place in sorted(range(len(sources)), key=lambda place: rank(sources[place])):
        if not sources[place].claims & taken:
            used.add(place)
            taken |= sources[place].claims
    return (
        [source for place, source in enumerate(sources) if place in used],
        [source for place, source in enumerate(sources) if place not in used],
    )


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
    kind = source.whole()
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
        yield from ((part, shape, whole) for part, shape in has.items() if part not in _BESIDE and SCALED not in part)
    for part in ("alpha", "scalar"):
        if part in has:
            yield part, has[part] if math.prod(has[part]) != 1 else (), ()
    for part, shape in has.items():
        if part.endswith(SCALED):  # one number, or one for each row
            of = has[part.removesuffix(SCALED)][:1]
            yield part, shape, shape if math.prod(shape) == 1 or shape in (of, (*of, 1)) else of
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
