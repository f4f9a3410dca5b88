"""Which documents a step takes: a function of (seed, step) alone, so that a resumed run needs nothing but the step.

Without weights all documents are one pool, read in epochs, each shuffled anew. With weights every dataset is a pool of its own,
and each stretch of steps has the datasets in the wanted proportions, within one document. The paper says how many documents of
each kind it had (600k for reasoning, 200k general) and nothing of their order.
"""

import random
from collections.abc import Sequence
from functools import lru_cache


class Order:
    """The documents of all steps, as numbers: the datasets' documents stand one behind the other."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, *, places: int, batch: int, seed: int) -> None:
        """sizes: documents of each dataset; places: documents of all steps together; the last step takes what is left."""
        self.places, self.batch, self._seed = places, batch, seed
        self._sizes = [sum(sizes)] if weights is None else list(sizes)
        self._starts = [sum(self._sizes[:number]) for number in range(len(self._sizes))]
        self._pools = bytes(places) if weights is None else _interleaved(weights, places)
        self._taken = [[0] * len(self._sizes)]
        """How many documents of each pool are taken before a step."""
        for step in range(self.steps):
            part = self._pools[step * batch : (step + 1) * batch]
            self._taken.append([count + part.count(pool) for pool, count in enumerate(self._taken[-1])])

    @property
    def steps(self) -> int:
        """Number of steps."""
        return -(-self.places // self.batch)

    def of_step(self, step: int) -> list[int]:
        """Numbers of the documents of step `step`, from 0."""
        taken, chosen = list(self._taken[step]), []
        for pool in self._pools[step * self.batch : (step + 1) * self.batch]:
            epoch, place = divmod(taken[pool], self._sizes[pool])
            name = "" if len(self._sizes) == 1 else f"-{pool}"
            chosen.append(self._starts[pool] + _shuffled(self._sizes[pool], f"documents-{self._seed}-{epoch}{name}")[place])
            taken[pool] += 1
        return chosen


def _interleaved(weights: Sequence[float], places: int) -> bytes:
    """The pool of each place: always the one that lags furthest behind its share."""
    shares = [weight / sum(weights) for weight in weights]
    taken, pools = [0] * len(shares), bytearray()
    for place in range(1, places + 1):
        pool = max(range(len(shares)), key=lambda i: shares[i] * place - taken[i])
        taken[pool] += 1
        pools.append(pool)
    return bytes(pools)


@lru_cache(maxsize=16)
def _shuffled(count: int, key: str) -> list[int]:
    order = list(range(count))
    random.Random(key).shuffle(order)
    return order
