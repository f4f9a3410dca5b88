"""Muon: momentum whose matrices are orthogonalized before they are added (Jordan et al. 2024; Liu et al., arXiv 2502.16982).

For training from scratch: a small model needs about a third of AdamW's steps to the same loss. `torch.optim.Muon` iterates in
bfloat16, which a CPU without instructions for it computes far more slowly than float32, and one matrix at a time; here the
iteration runs in float32 and takes matrices of the same shape together.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration (Jordan): steep at zero, so that singular values end between about 0.7 and 1.2."""
UPDATE_RMS = 0.2
"""Root mean square of an update's entries, as a share of the learning rate: about AdamW's (arXiv 2502.16982, equation 4)."""


def orthogonalized(matrices: Tensor) -> Tensor:
    """(B, m, n) matrices, m <= n, with their singular values brought close to 1 and their singular vectors kept."""
    a, b, c = COEFFICIENTS
    x: Tensor = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.AdamW):
    """Muon for the matrices between a language model's embedding and head, AdamW for its other parameters."""

    def __init__(self, model: nn.Module, **adamw: Any) -> None:
        """`adamw`: AdamW's arguments; learning rate and weight decay are Muon's too."""
        ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
        apart = {id(parameter) for end in ends for parameter in end.parameters()}
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            groups[parameter.ndim == 2 and id(parameter) not in apart].append(parameter)
        super().__init__([{"params": group} for group in groups], **adamw)
        self.matrices = groups[1]

    def moments(self, parameter: Tensor) -> tuple[str, ...]:
        """Names of the state, each of the parameter's shape, on which its next step depends."""
        return ("exp_avg",) if any(parameter is matrix for matrix in self.matrices) else ("exp_avg", "exp_avg_sq")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step, then drop the matrices' gradients."""
        group = self.param_groups[1]
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        weight: Tensor
        for weight in self.matrices:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["exp_avg"] = torch.zeros_like(weight)
            momentum = state["exp_avg"].lerp_(weight.grad, 1 - MOMENTUM)
            update = weight.grad.lerp(momentum, MOMENTUM)  # Nesterov's
            weight.grad = None  # AdamW leaves a parameter without gradient alone
            wide = update if update.shape[0] <= update.shape[1] else update.mT
            by_shape.setdefault(wide.shape, []).append((weight, wide))
        for (_, columns), some in by_shape.items():
            changes = orthogonalized(torch.stack([update for _, update in some]))
            for (weight, _), change in zip(some, changes, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                change = change if weight.shape == change.shape else change.mT
                weight.add_(change, alpha=-group["lr"] * UPDATE_RMS * math.sqrt(columns))
        super().step(closure)
