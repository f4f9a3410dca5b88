"""Mixing sources by weight: how many problems come from each, and which."""

import math
import random
from dataclasses import replace

from stages.contract.errors import UserError
from stages.problems.episode import Problem


def shares_of(weights: list[float], sizes: list[int], count: int | None, where: str) -> list[int]:
    """Problems of each part: `count` by weight (largest remainders), or the most that no part is too small for.

    Raises UserError when a part is too small for its share.
    """
    whole = math.fsum(weights)
    most = min(int(size * whole / weight) for weight, size in zip(weights, sizes, strict=True)) if count is None else count
    while True:
        exact = [most * weight / whole for weight in weights]
        shares = [int(share) for share in exact]
        # Of equal remainders the earlier part gets one more.
        by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
        for index in by_remainder[: most - sum(shares)]:
            shares[index] += 1
        short = next((i for i, size in enumerate(sizes) if shares[i] > size), None)
        if short is None and most > 0:
            return shares
        if count is not None and short is not None:
            what = f"{shares[short]} problems are to come from it, it has {sizes[short]}"
            raise UserError(what, where=f"{where}.parts.{short}", mend="lower its weight or `count`, or leave `count` out")
        if most <= 1:
            raise UserError("a part has too few problems for its weight", where=f"{where}.parts", mend="lower its weight")
        most -= 1


def draw(pools: list[list[Problem]], shares: list[int], seed: int) -> tuple[list[Problem], dict[str, tuple[int, int]]]:
    """The first problems of each (shuffled) pool in an order of the seed's; and part -> problems drawn, problems there were."""
    drawn: list[Problem] = []
    parts: dict[str, tuple[int, int]] = {}
    taken: set[str] = set()
    for index, (pool, share) in enumerate(zip(pools, shares, strict=True), start=1):
        chosen = pool[:share]
        if taken & {problem.id for problem in chosen}:  # two files of one name: ids are part of the seed of the samples
            chosen = [replace(problem, id=f"{problem.id} (part {index})") for problem in chosen]
        taken.update(problem.id for problem in chosen)
        name = pool[0].source if pool else f"part {index}"
        parts[name if name not in parts else f"{name} (part {index})"] = (share, len(pool))
        drawn += chosen
    random.Random(f"mixture-{seed}").shuffle(drawn)
    return drawn, parts
