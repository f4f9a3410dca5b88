"""The reference policy of the KL term: frozen, and renewed only when the recipe says so."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from stages.engine.deepspeed_engine import Engine
from stages.engine.packing.pack import Packed
from stages.engine.scorer import TokenScorer
from stages.runtime.clock import clock


class Reference:
    """A whole copy of the weights on every rank."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """`model`: the policy as it stood at the stage's start, with the same adapters if it has any."""
        self.scorer = TokenScorer(model.to(device)).eval()
        self.device = device
        self.refreshed = False
        """Whether it is the stage's input no more."""

    def logp(self, packed: Packed, temperature: float) -> Tensor:
        """(N,) log-probabilities of the predicted tokens."""
        with clock.span("forward"):
            scored: tuple[Tensor, ...] = self.scorer(packed.to(self.device), temperature)
        return scored[0]

    def refresh(self, policy: Engine) -> None:
        """Become the policy of now (R1-Zero does every 400 updates). Every rank calls it."""
        with clock.span("weights"):
            policy.copy_weights(self.scorer.model)
        self.refreshed = True

    def state(self, *, main: bool) -> dict[str, Tensor]:
        """Its weights for a checkpoint, copied; nothing when they are those of the stage's input. Rank 0 (`main`) has them."""
        if not (main and self.refreshed):
            return {}
        return {name: weight.detach().to("cpu", copy=True).contiguous() for name, weight in self._moving()}

    def restore(self, stored: Callable[[str], Tensor]) -> None:
        """Take the weights from a checkpoint. Every rank calls it."""
        self.refreshed = True
        with torch.no_grad():
            for name, weight in self._moving():
                weight.copy_(stored(name))

    def _moving(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights that training changes: all, or the adapters alone."""
        return ((name, weight) for name, weight in self.scorer.named_parameters() if weight.requires_grad)
