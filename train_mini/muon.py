"""The Muon optimiser: steps of equal spectral size for weight matrices.

An implementation of our own, because torch.optim.Muon updates one matrix at a time; here matrices of the same shape are
stacked. Plain AdamW learned backgrounds and sizes but no identities in 39,000 samples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch

from .loop import Rate

# Newton-Schulz quintic of Keller Jordan's Muon (2024): drives all singular values towards 1 without an SVD.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(g: torch.Tensor, steps: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the nearest semi-orthogonal matrices, roughly, of a stack [N, rows, columns]."""
    a, b, c = COEFFICIENTS
    x: torch.Tensor = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, then orthogonalisation; the step is lr * sqrt(max(1, rows / columns))."""

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float,
        momentum: float = 0.95,
        steps: int = 5,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "steps": steps})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch lets it be a function as well
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append((p, p.grad))
            for shape, pairs in shapes.items():
                updates = []
                for p, gradient in pairs:
                    state = self.state[p]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(gradient, 1 - group["momentum"])
                    updates.append(gradient.lerp(state["momentum"], group["momentum"]))
                stack = orthogonalise(torch.stack(updates), group["steps"], self.dtype)
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for (p, _), update in zip(pairs, stack, strict=True):
                    p.add_(update, alpha=-scale)


def muon_and_adamw(
    model: torch.nn.Module, is_matrix: Callable[[str], bool], muon: float, adamw: float, rate: Rate, dtype: torch.dtype
) -> list[tuple[torch.optim.Optimizer, Rate]]:
    """Return Muon for the matrices whose names are chosen, AdamW for the rest; `rate` is a factor on both rates."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and is_matrix(name)]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        (Muon(matrices, lr=muon, dtype=dtype), lambda step: muon * rate(step)),
        (torch.optim.AdamW(rest, lr=adamw, betas=(0.9, 0.95), weight_decay=0.0), lambda step: adamw * rate(step)),
    ]
