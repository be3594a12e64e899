"""A LoRA's numbers: read once, added to a transformer exactly, and taken away exactly.

A transformer's own weights are never written to. Where memory allows, a layer computes with a changed copy of its
weight, and the untouched original is put back afterwards: a step then costs what it costs without a LoRA. Where it does
not, and where a layer holds its weight in a form of its own (offloaded, quantized), a hook adds the difference to the
layer's output. Either way strength is linear, and what was there before is there again: see docs/adr/0010.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeGuard, cast

import torch
from cachetools import LRUCache
from safetensors import SafetensorError, safe_open
from torch.nn import functional as F

import lora.file
from lora.dialects import SCALED, matrix, quoted
from lora.file import NUMBERS, Identity, LoraFile
from lora.report import Report, refused

KEPT_FILES, KEPT_BYTES = 8, 2 << 30  # of parsed files, in the host's memory
NO_LENGTH = 1e-12  # of a row or column: torch's own bound where it normalizes
PROBE_ROWS = 512  # unit vectors at a time, to read a weight out of a layer that hides it

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Change:
    """What a source of the file does: to which modules (rows one after the other), with which tensors by part."""

    targets: tuple[str, ...]
    kind: str
    scale: float
    tensors: Tensors


@dataclass(frozen=True)
class Adapter:
    """A LoRA ready to be applied, on the host, in its file's dtypes."""

    report: Report
    identity: Identity
    changes: tuple[Change, ...]

    @property
    def bytes(self) -> int:
        """Memory that its tensors take."""
        return sum(values.nbytes for change in self.changes for values in change.tensors.values())


class Adapters:
    """The files used last, parsed: the same file again is neither read nor converted, and a copy of it only hashed."""

    def __init__(self) -> None:
        self._kept: LRUCache[str, Adapter] = LRUCache(KEPT_BYTES, getsizeof=_share)
        self._identities: LRUCache[tuple[str, int, int, int, bytes], Identity] = LRUCache(8 * KEPT_FILES)

    def get(self, file: LoraFile) -> Adapter:
        """Return a file's adapter.

        Raises:
            RequestError: a tensor holds NaN or infinity, nothing in the file changes anything, or it cannot be read.
        """
        try:
            status = file.path.stat()
        except OSError as problem:
            raise refused(file.report.name, "a file that can be read ({problem})", problem=problem.strerror) from None
        mark = (str(file.path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino, file.config)
        identity = self._identities.get(mark) or lora.file.identify(file)
        self._identities[mark] = identity
        if (adapter := self._kept.get(identity.digest)) is None:
            adapter = self._kept[identity.digest] = _load(file, identity)
        return adapter


def _share(adapter: Adapter) -> int:
    """Return how much of KEPT_BYTES an adapter takes: so much that KEPT_FILES are the most, and that any one fits."""
    return min(max(adapter.bytes, KEPT_BYTES // KEPT_FILES), KEPT_BYTES)


def _load(file: LoraFile, identity: Identity) -> Adapter:
    """Read the tensors that are used, and check their numbers."""
    name, changes = file.report.name, []
    try:
        with safe_open(file.path, framework="pt") as tensors:
            for layer in file.layers:
                parts = {
                    # Cloned, because the file is mapped and may go away: an upload does.
                    part: tensors.get_tensor(tensor).clone()
                    for part, tensor in layer.source.parts.items()
                    if part not in NUMBERS
                }
                for part, values in parts.items():
                    tensor = layer.source.parts[part]
                    if tuple(values.shape) != file.header.tensors[tensor].shape:
                        raise refused(name, "a file that nobody changes meanwhile")
                    if not torch.isfinite(values.float()).all():
                        raise refused(name, "finite numbers; {tensor} holds NaN or infinity", tensor=quoted(tensor))
                    # fp8 is for storing alone: bf16 holds the same numbers, and can be computed with
                    values = values.bfloat16() if values.itemsize == 1 else values
                    parts[part] = values.reshape(matrix(tuple(values.shape)))
                changes.append(Change(layer.source.targets, str(layer.source.kind), layer.scale, _unscaled(parts)))
    except (OSError, SafetensorError) as problem:
        raise refused(name, "a file that can be read ({problem})", problem=str(problem)) from None
    if not any(_does_something(change) for change in changes):
        raise refused(name, "a LoRA that changes something; every weight of this one is zero")
    # DoRA first: its magnitudes are of the weight as it was, whatever else a layer has is added to what comes of it.
    return Adapter(file.report, identity, tuple(sorted(changes, key=lambda change: "magnitude" not in change.tensors)))


def _unscaled(parts: Tensors) -> Tensors:
    """Return parts multiplied by their scales, where they have one: a number, or one for each row."""
    whole = {}
    for part, values in parts.items():
        if not part.endswith(SCALED):
            scale = parts.get(part + SCALED)
            by = None if scale is None else scale.float().reshape(-1, *[1] * (values.ndim - 1))
            whole[part] = values if by is None else values.float() * by
    return whole


def _does_something(change: Change) -> bool:
    parts = change.tensors
    if any(parts[part].any() for part in ("magnitude", "diff", "diff_b", "up_bias") if part in parts):
        return True
    factors = [values for part, values in parts.items() if part not in ("magnitude", "diff", "diff_b", "up_bias")]
    return bool(factors) and change.scale != 0 and all(bool(values.any()) for values in factors)


# --- what a change adds ------------------------------------------------------------------------------------------


def difference(change: Change, parts: Tensors) -> torch.Tensor | None:
    """Return what is added to the weight at strength 1, as fp32 [rows, columns] (of a norm [rows]); None where nothing.

    Args:
        change: the change.
        parts: its tensors, in fp32, on the device to compute on.
    """
    if change.kind == "LoRA":
        return change.scale * (parts["up"] @ parts["down"])
    if change.kind == "LoHa":
        first, second = parts["hada_w1_a"] @ parts["hada_w1_b"], parts["hada_w2_a"] @ parts["hada_w2_b"]
        return change.scale * first * second
    if change.kind == "LoKr":
        return change.scale * torch.kron(*_kronecker(parts))
    return parts.get("diff")


def _kronecker(parts: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Return LoKr's two factors, each multiplied out where it is given as a product of two."""
    first, second = (
        parts[factor] if factor in parts else parts[factor + "_a"] @ parts[factor + "_b"]
        for factor in ("lokr_w1", "lokr_w2")
    )
    return first, second


def _bias(change: Change, parts: Tensors) -> torch.Tensor | None:
    """Return what is added to the bias at strength 1, [rows]."""
    return change.scale * parts["up_bias"] if "up_bias" in parts else parts.get("diff_b")


def _ratio(weight: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Return DoRA's magnitude over the weight's norm: [rows, 1], or [1, columns] where each column has its own."""
    by_column = magnitude.ndim == 2 and magnitude.shape[0] == 1
    norm: torch.Tensor = weight.norm(dim=0 if by_column else 1, keepdim=True)
    ratio = (magnitude if by_column else magnitude.reshape(-1, 1)) / norm.clamp_min(NO_LENGTH)
    return torch.where(norm > NO_LENGTH, ratio, 0.0)  # what has no length has no direction, and stays zero


def changed(weight: torch.Tensor, change: Change, parts: Tensors, strength: float) -> torch.Tensor:
    """Return a weight with a change in it, all in fp32: weight + strength x (the weight at strength 1 - weight).

    Args:
        weight: [rows, columns]; of a fused source its modules' rows together.
        change: the change.
        parts: its tensors, in fp32.
        strength: how much of it.
    """
    if change.kind == "LoRA" and "magnitude" not in parts:  # the usual one, in a single pass over the weight
        return torch.addmm(weight, parts["up"], parts["down"], alpha=strength * change.scale)
    added = difference(change, parts)
    if added is None:
        return weight
    if "magnitude" in parts:
        whole = weight + added
        added = whole * _ratio(whole, parts["magnitude"]) - weight
    return weight + strength * added


# --- applying it -------------------------------------------------------------------------------------------------


_applied: weakref.WeakKeyDictionary[torch.nn.Module, tuple[tuple[str, float], ...]] = weakref.WeakKeyDictionary()


def loras_of(transformer: torch.nn.Module) -> tuple[tuple[str, float], ...]:
    """Return the digests and strengths of the LoRAs that a transformer computes with now."""
    return _applied.get(transformer, ())


@contextmanager
def applied(
    transformer: torch.nn.Module,
    adapter: Adapter,
    strength: float,
    room: int,
    dtype: torch.dtype,
    kept: KeptCopies | None = None,
) -> Iterator[None]:
    """Let a transformer compute with a LoRA inside the block; afterwards it is what it was, whatever happens.

    Args:
        transformer: ZImageDiT, plain, under DiffSynth's VRAM management, or quantized.
        adapter: what to apply.
        strength: how much of it, of either sign; 0 changes nothing at all.
        room: bytes of the device's memory that changed copies of weights may take. Where all of them together need
            more, hooks do the work.
        dtype: what is computed in, where a layer does not say so itself.
        kept: where the copies stay for the next time.
    """
    kept = KeptCopies() if kept is None else kept  # an empty one is false
    with ExitStack() as undo:
        if not strength:
            kept.forget()
        else:
            undo.callback(_applied.__setitem__, transformer, loras_of(transformer))
            _applied[transformer] = (*loras_of(transformer), (adapter.identity.digest, strength))
            changes: dict[tuple[str, ...], list[Change]] = {}
            for change in adapter.changes:
                changes.setdefault(change.targets, []).append(change)
            modules = {targets: [_module(transformer, target) for target in targets] for targets in changes}
            copied = {id(module): _copy_bytes(module) for group in modules.values() for module in group}
            fits = sum(size or 0 for size in copied.values()) <= room
            key = weakref.ref(transformer), adapter.identity.digest, strength, fits
            known = kept.get(key)
            copies = [] if known is None else _put_in(known, undo)
            hooked = False
            for targets, group in modules.items():
                if fits and all(copied[id(module)] is not None for module in group):
                    if known is None:  # at once, since a module may be in the next group too
                        copies += _put_in(_copies(changes[targets], group, strength), undo)
                else:
                    hooked = True
                    for change in changes[targets]:
                        _hook(change, group, strength, dtype, undo)
            if not hooked:  # what hooks are made of depends on the weights that they find
                kept.put(key, copies)
        yield


def _module(transformer: torch.nn.Module, name: str) -> torch.nn.Module:
    # By attributes: `get_submodule` does not look through DiffSynth's wrappers.
    return functools.reduce(getattr, name.split("."), transformer)


def _copy_bytes(module: torch.nn.Module) -> int | None:
    """Return what a changed copy of a module's weight takes; None where the module's weight is not plainly its own."""
    weight = module._parameters.get("weight")  # not `module.weight`: a wrapper hands on its inner module's
    if _is_plain(weight) and (weight.ndim == 1 or type(module).forward is torch.nn.Linear.forward):
        return weight.nbytes
    return None


def _is_plain(tensor: torch.Tensor | None) -> TypeGuard[torch.nn.Parameter]:
    return type(tensor) is torch.nn.Parameter and tensor.dtype.is_floating_point and not tensor.is_meta


def _on(device: torch.device, change: Change) -> dict[str, torch.Tensor]:
    return {part: values.to(device).float() for part, values in change.tensors.items()}


Copies = list[tuple[torch.nn.Module, str, torch.nn.Parameter]]  # of weights and biases, by module and name


class KeptCopies:
    """The changed copies that were made last: the same LoRA at the same strength costs nothing the next time."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._copies: Copies = []

    def __len__(self) -> int:
        return len(self._copies)

    def get(self, key: Hashable) -> Copies | None:
        """Return the copies of this key; others are let go, so that there is room to make them."""
        if key != self._key:
            self.forget()
            return None
        return self._copies

    def put(self, key: Hashable, copies: Copies) -> None:
        """Keep copies in place of those before."""
        self._key, self._copies = key, copies

    def forget(self) -> None:
        """Give the memory back."""
        self._key, self._copies = None, []


def _copies(changes: Sequence[Change], modules: Sequence[torch.nn.Module], strength: float) -> Copies:
    """Return changed copies of modules' weights and biases."""
    weights = [_own_weight(module) for module in modules]
    rows = [len(weight) for weight in weights]
    with torch.no_grad():
        whole = torch.cat([weight.float() for weight in weights]) if len(weights) > 1 else weights[0].float()
        bias: torch.Tensor | None = None
        for change in changes:
            parts = _on(weights[0].device, change)
            whole = changed(whole, change, parts, strength)
            if (added := _bias(change, parts)) is not None:
                bias = added if bias is None else bias + added
        pieces = whole.split(rows)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        biases: Sequence[torch.Tensor | None] = [None] * len(modules)
        if bias is not None:
            biases = bias.split(rows)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    copies: Copies = []
    for module, weight, piece, added in zip(modules, weights, pieces, biases, strict=True):
        copies.append((module, "weight", _fixed(piece.to(weight.dtype))))
        if added is not None:
            old = module._parameters.get("bias")
            whole_bias = strength * added + (0 if old is None else old.float())
            copies.append((module, "bias", _fixed(whole_bias.to(weight.dtype))))
    return copies


def _own_weight(module: torch.nn.Module) -> torch.nn.Parameter:
    weight = module._parameters["weight"]
    assert weight is not None  # `_copy_bytes` has seen it
    return weight


def _put_in(copies: Copies, undo: ExitStack) -> Copies:
    """Let modules use copies, until the end; returns them."""
    for module, name, values in copies:
        undo.callback(module._parameters.__setitem__, name, module._parameters.get(name))
        module._parameters[name] = values
    return copies


def _fixed(values: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(values, requires_grad=False)


def _hook(
    change: Change, modules: Sequence[torch.nn.Module], strength: float, dtype: torch.dtype, undo: ExitStack
) -> None:
    """Let modules add the change to what they compute, until the end."""
    if modules[0].weight.ndim == 1:
        _hook_norm(change, modules[0], strength, undo)
        return
    # Linear layers now: torch's, or what has the same attributes (DiffSynth's wrappers, quantized layers).
    linears = [cast(torch.nn.Linear, module) for module in modules]
    device, dtype = _computes_on(linears[0], dtype)
    parts = _on(device, change)
    bias, ratio = _bias(change, parts), None
    with torch.no_grad():
        if "magnitude" in parts:
            whole = torch.cat([_weight_of(linear, device, dtype) for linear in linears])
            added = difference(change, parts)
            ratio = _ratio(whole if added is None else whole + added, parts["magnitude"])
        apply = _times(change, parts, dtype)
    row = 0
    for linear in linears:
        rows = slice(row, row + linear.out_features)
        row = rows.stop
        own = ratio if ratio is None or ratio.shape[0] == 1 else ratio[rows]
        _hook_linear(linear, apply(rows), strength, own, None if bias is None else bias[rows], dtype, undo)


Add = Callable[[torch.Tensor, torch.Tensor, float], None]  # (y [n, rows], x [n, columns], by): y += by x difference(x)


def _times(change: Change, parts: Tensors, dtype: torch.dtype) -> Callable[[slice], Add]:
    """Return, for some rows of a change, what adds its product with an input to an output, in place.

    Factors stay factors, since the product of two thin matrices is much less work than that of one thick one.
    """
    if change.kind == "LoKr":
        first, second = (factor.to(dtype) for factor in _kronecker(parts))

        def kron(rows: slice) -> Add:
            def add(y: torch.Tensor, x: torch.Tensor, by: float) -> None:
                shape = first.shape[1], second.shape[1]
                x = x.unflatten(-1, shape)  # type: ignore[no-untyped-call]  # torch leaves it untyped
                inner = x @ second.T  # [n, b, c]
                y.add_((first @ inner).flatten(-2)[:, rows], alpha=by * change.scale)

            return add

        return kron
    up: torch.Tensor | None
    down: torch.Tensor | None
    if change.kind == "LoHa":
        # The element-wise product of two products is one product, of the factors' row-wise Kronecker products.
        up = (parts["hada_w1_a"].unsqueeze(2) * parts["hada_w2_a"].unsqueeze(1)).flatten(1)
        down = (parts["hada_w1_b"].unsqueeze(1) * parts["hada_w2_b"].unsqueeze(0)).flatten(0, 1)
        if len(down) * (len(up) + down.shape[1]) > len(up) * down.shape[1]:  # no longer thin
            up, down = up @ down, None
    elif change.kind == "LoRA":
        up, down = parts["up"], parts["down"]
    else:
        up, down = parts.get("diff"), None
    up, down = (None if factor is None else factor.to(dtype) for factor in (up, down))

    def thin(rows: slice) -> Add:
        up_rows = None if up is None else up[rows].T

        def add(y: torch.Tensor, x: torch.Tensor, by: float) -> None:
            if up_rows is not None:
                y.addmm_(x if down is None else F.linear(x, down), up_rows, alpha=by * change.scale)

        return add

    return thin


def _hook_linear(
    module: torch.nn.Linear,
    add: Add,
    strength: float,
    ratio: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    undo: ExitStack,
) -> None:
    """Add to a linear layer's output. With DoRA's ratio r the weight W becomes W + s (r (W + D) - W)."""
    shift = None if bias is None else (strength * bias).to(dtype)
    by_column = ratio is not None and ratio.shape[0] == 1
    follows = bool(module._forward_pre_hooks)  # a DoRA by column, which changes what comes in
    entered: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        entered.append(inputs[0])

    def before(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        assert ratio is not None  # this is hooked by column only
        # W (x + s (r - 1) x) + s D (r x): the first product is the layer's own, of another input.
        entered.append(inputs[0] * ratio[0].to(inputs[0].dtype))
        return (torch.lerp(inputs[0], entered[0], strength), *inputs[1:])

    def after(layer: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = entered.pop() if by_column or follows else inputs[0]
        x, y = x.reshape(-1, x.shape[-1]).to(output.dtype), output.view(-1, output.shape[-1])
        if ratio is None or by_column:
            add(y, x, strength)
        else:
            own = ratio.T.to(y.dtype)
            turned = y.clone() if layer.bias is None else y - layer.bias.to(y)
            y.sub_(turned, alpha=strength)
            add(turned, x, 1.0)
            y.addcmul_(turned, own, value=strength)
        if shift is not None:
            y.add_(shift)
        return output

    if by_column:
        undo.callback(module.register_forward_pre_hook(before).remove)
    elif follows:
        undo.callback(module.register_forward_pre_hook(keep, prepend=True).remove)
    undo.callback(module.register_forward_hook(after).remove)


def _hook_norm(change: Change, module: torch.nn.Module, strength: float, undo: ExitStack) -> None:
    """Add to an RMS norm's output: the difference of its weight times what was normed."""
    values = strength * change.tensors["diff"].float()

    def after(norm: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0].float()
        eps = cast(float, norm.eps)  # a number, in whatever class of norm
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return output + (normed * values.to(x.device)).to(output.dtype)

    undo.callback(module.register_forward_hook(after).remove)


def _computes_on(module: torch.nn.Linear, dtype: torch.dtype) -> tuple[torch.device, torch.dtype]:
    """Return where and in what a layer computes: DiffSynth's wrappers say so, other layers do it where they lie."""
    device = getattr(module, "computation_device", None) or module.weight.device
    own = getattr(module, "computation_dtype", None) or dtype
    return torch.device(device), own if own.itemsize > 1 else dtype  # fp8 products come out in the input's dtype


def _weight_of(module: torch.nn.Linear, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight that a layer computes with, fp32 [rows, columns], in whatever form it is held."""
    if _is_plain(weight := module._parameters.get("weight")):
        return weight.to(device).float()
    # Packed, or on the disk: the layer's answers to the unit vectors are its weight's columns.
    waits = getattr(module, "state", None) == 0  # DiffSynth's wrappers answer only where they were fetched before
    if waits:
        module.onload()  # type: ignore[operator]  # a method of DiffSynth's wrappers
    bias = 0.0 if module.bias is None else module.bias.to(device).float()
    columns = []
    for start in range(0, module.in_features, PROBE_ROWS):
        count = min(PROBE_ROWS, module.in_features - start)
        units = torch.zeros(count, module.in_features, device=device, dtype=dtype)
        units[range(count), range(start, start + count)] = 1
        columns.append(module(units).float() - bias)
    if waits:
        module.offload()  # type: ignore[operator]  # as above
    return torch.cat(columns).T
