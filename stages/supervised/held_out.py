"""The loss on documents that are not trained on: the mean over all their predicted tokens, and apart for each dataset."""

from collections.abc import Sequence

import torch

from stages.engine import distributed
from stages.engine.deepspeed_engine import Engine
from stages.engine.packing.pack import Text


class HeldOut:
    """Held-out documents. Every rank has all of them and measures its share."""

    def __init__(self, texts: Sequence[Text], datasets: Sequence[str], micro_tokens: int) -> None:
        """`datasets[n]`: name of the dataset that text n is from."""
        self.texts, self.micro_tokens = texts, micro_tokens
        self.names = sorted(set(datasets))
        self._number = torch.tensor([self.names.index(name) for name in datasets])

    def measure(self, engine: Engine) -> dict[str, float]:
        """`eval/loss` in nats per predicted token; with several datasets also `eval/loss/NAME`. Every rank calls it."""
        batches = engine.micro_batches(self.texts, self.micro_tokens)
        sums = torch.zeros(len(self.names), dtype=torch.float64)
        counts = torch.zeros(len(self.names), dtype=torch.float64)
        with torch.no_grad():
            for index, packed in enumerate(engine.equalise(batches, self.texts[0])):
                logp = engine.score(packed)[0].double().cpu()
                if index < len(batches):
                    dataset = self._number[packed.owner.cpu()]
                    sums.index_add_(0, dataset, -logp)
                    counts.index_add_(0, dataset, torch.ones_like(logp))
        everywhere = distributed.gather((sums, counts))
        sums, counts = sum(s for s, _ in everywhere), sum(c for _, c in everywhere)  # type: ignore[assignment]
        found = {"eval/loss": float(sums.sum() / counts.sum())}
        if len(self.names) > 1:
            found |= {f"eval/loss/{name}": float(s / c) for name, s, c in zip(self.names, sums, counts, strict=True)}
        return found
