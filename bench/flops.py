"""Floating-point operations of a piece of torch code, counted by torch's formulas without carrying out the large ones.

The count follows from shapes alone, so matrix products, convolutions and attention are given empty results: a picture
of the real width is counted in seconds, and with weights that no memory was ever touched for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_flop_count


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object) -> int:
    flops: int = sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return flops


# torch's own table leaves out the kernel that CPUs use for attention.
FORMULAS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts operations, and gives those that it counts results of zeros.

    `torch.utils.flop_counter.FlopCounterMode` gives the same numbers, as a test holds, but takes three times as long
    and computes everything.

    Attributes:
        flops: so far.
    """

    flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = FORMULAS.get(func._overloadpacket)
        if formula is None:
            if not _is_made_of_others(func):
                return func(*args, **kwargs)
            with self:
                return func.decompose(*args, **kwargs)
        device = next(value.device for value in args if isinstance(value, torch.Tensor))
        args, kwargs = tree_map_only(torch.Tensor, lambda value: value.to("meta"), (args, kwargs))
        result = func(*args, **kwargs)
        self.flops += formula(*args, **kwargs, out_val=result)
        return tree_map_only(
            torch.Tensor, lambda value: torch.zeros(value.shape, dtype=value.dtype, device=device), result
        )


@cache
def _is_made_of_others(func: Any) -> bool:
    """Whether torch takes an operation apart, which in inference mode it does only after asking a mode."""
    made: bool = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return made


@contextmanager
def counted() -> Iterator[Counter]:
    """Count the operations inside the block, whose results are meaningless."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what is left is small
    try:
        with torch.no_grad(), Counter() as counter:  # type: ignore[no-untyped-call]  # torch leaves it untyped
            yield counter
    finally:
        torch.set_num_threads(threads)
