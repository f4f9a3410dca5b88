"""Which problems a step draws: epochs in shuffled order, as a function of the step alone, so nothing of it can be lost."""

import random
from collections.abc import Sequence

from stages.problems.episode import Problem
from stages.store.errors import UserError


class ProblemSampler:
    """Draws problems without repetition within an epoch, and never one twice in a step."""

    def __init__(self, problems: Sequence[Problem], per_step: int, seed: int) -> None:
        """Raises UserError when there are fewer problems than a step draws."""
        if len(problems) < per_step:
            what = f"a step draws {per_step} different problems, there are {len(problems)}"
            raise UserError(what, where="questions", mend="make it smaller, or give more problems")
        self.problems, self.per_step, self.seed = problems, per_step, seed

    def draw(self, step: int) -> list[Problem]:
        """The problems of step `step` (from 0). The few left at the end of an epoch wait for another one's order."""
        epoch, place = divmod(step, len(self.problems) // self.per_step)
        order = list(range(len(self.problems)))
        random.Random(f"problems-{self.seed}-{epoch}").shuffle(order)
        return [self.problems[i] for i in order[place * self.per_step : (place + 1) * self.per_step]]
