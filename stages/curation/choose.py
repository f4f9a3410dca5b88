"""What becomes of each sampled answer: the filter that it fails, a near-duplicate, one too many, or chosen."""

import random
from collections import Counter
from collections.abc import Callable, Iterable

from stages.curation.duplicates import Finder
from stages.curation.filters import first_failure
from stages.curation.settings import CurateConfig
from stages.problems.episode import Episode, Group

CHOSEN, DUPLICATE, SURPLUS = "chosen", "duplicate", "surplus"
Places = list[tuple[int, int]]
"""Where a chunk's chosen answers are: number of the group, number of the episode in it; in the order of choice."""


def fates(group: Group, config: CurateConfig, finder: Finder | None) -> dict[int, str]:
    """Number of each answer in the group -> its fate. The chosen come first, in the order of choice."""
    failures = {n: first_failure(episode, config.filters, config.rewards) for n, episode in enumerate(group.episodes)}
    good = [n for n, failure in failures.items() if failure is None]
    good.sort(key=lambda n: (_cost(group.episodes[n], config), group.episodes[n].sample))
    if finder is not None:
        finder.next_problem()
    found: dict[int, str] = {}
    taken = 0
    for n in good:
        if taken == config.per_problem:
            found[n] = SURPLUS
        elif finder is not None and finder.near(group.episodes[n].text):
            found[n] = DUPLICATE
        else:
            found[n] = CHOSEN
            taken += 1
    return found | {n: failure for n, failure in failures.items() if failure is not None}


def _cost(episode: Episode, config: CurateConfig) -> float:
    if config.choose == "random":
        return random.Random(f"choose-{config.seed}-{episode.problem.question}-{episode.sample}").random()
    return len(episode.completion_ids) if config.choose == "shortest" else episode.sample


class Selection:
    """The choice over all chunks. It holds places and numbers only; the answers stay on disk."""

    def __init__(self) -> None:
        self.fates: Counter[str] = Counter()
        self.sampled = self.right = self.tokens = self.problems = self.chosen_tokens = 0
        self.places: list[Places] = []

    def choose(
        self, chunks: Iterable[list[Group]], config: CurateConfig, finder: Finder | None, check: Callable[[], None]
    ) -> None:
        """Go through the chunks in order. `check` is called between them."""
        for groups in chunks:
            check()
            places: Places = []
            for number, group in enumerate(groups):
                found = fates(group, config, finder)
                self.fates.update(found.values())
                chosen = [n for n, fate in found.items() if fate == CHOSEN]
                places += [(number, n) for n in chosen]
                self.problems += 1
                self.chosen_tokens += sum(len(group.episodes[n].completion_ids) for n in chosen)
                self.sampled += len(group.episodes)
                self.right += sum(e.scored.verdict == "right" for e in group.episodes)
                self.tokens += sum(len(e.completion_ids) for e in group.episodes)
            self.places.append(places)
