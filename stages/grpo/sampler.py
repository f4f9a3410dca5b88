"""Which problems a step draws: epochs in shuffled order, as a function of the step alone, so nothing of it can be lost."""

import random
from collections.abc import Sequence

from stages.problems.episode import Problem


class ProblemSampler:
    """Draws problems without repetition within an epoch."""

    def __init__(self, problems: Sequence[Problem], per_step: int, seed: int) -> None:
        self.problems, self.per_step, self.seed = problems, per_step, seed
        self._epoch, self._order = -1, list(range(len(problems)))

    def draw(self, step: int) -> list[Problem]:
        """The problems of step `step` (from 0). A problem may come twice in a step only where two epochs meet in it."""
        chosen = []
        for place in range(step * self.per_step, (step + 1) * self.per_step):
            epoch, index = divmod(place, len(self.problems))
            if epoch != self._epoch:
                self._epoch, self._order = epoch, list(range(len(self.problems)))
                random.Random(f"problems-{self.seed}-{epoch}").shuffle(self._order)
            chosen.append(self.problems[self._order[index]])
        return chosen
