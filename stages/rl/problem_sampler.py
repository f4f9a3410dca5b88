"""Which problems a step draws: epochs in shuffled order, as a function of a position alone, the one number to be kept."""

import random
from collections.abc import Sequence

from stages.contract.errors import UserError
from stages.problems.episode import Problem


class ProblemSampler:
    """Draws problems without repetition within an epoch, and never one twice in a step."""

    def __init__(self, problems: Sequence[Problem], per_step: int, seed: int) -> None:
        """Raises UserError when there are fewer problems than a step draws."""
        if len(problems) < per_step:
            what = f"a step draws {per_step} different problems, there are {len(problems)}"
            raise UserError(what, where="questions", mend="make it smaller, or give more problems")
        self.problems, self.seed = problems, seed
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def draw(self, position: int, count: int, taken: Sequence[Problem] = ()) -> tuple[list[Problem], int]:
        """`count` problems from `position` on (0 at first), and the position after them.

        Where fewer are left of an epoch, they wait for another one's order. `taken`: problems that the step has already, which
        are passed over; only when all are taken do fewer come than asked for.
        """
        size = len(self.problems)
        count = min(count, size - len(taken))
        if count <= 0:
            return [], position
        if position % size + count > size:
            position += size - position % size
        # What is not taken lies all ahead in this epoch or, after the jump, in the next: none can come twice.
        done, found = set(taken), list[Problem]()
        while len(found) < count:
            problem = self.problems[self._order(position // size)[position % size]]
            position += 1
            if problem not in done:
                found.append(problem)
        return found, position

    def _order(self, epoch: int) -> list[int]:
        if self._shuffled[0] != epoch:
            order = list(range(len(self.problems)))
            random.Random(f"problems-{self.seed}-{epoch}").shuffle(order)
            self._shuffled = (epoch, order)
        return self._shuffled[1]
