"""Scoring by further lm-eval tasks: what a task's own scorer raises on a sampled answer costs that answer, not the stage.

lm-eval converts an answer to the type of the task's target, so that a task with numbers as targets raises ValueError on the
first answer in words; tasks with scorers of their own raise whatever these do.
"""

import sys
from typing import Any

from lm_eval.api.metrics import mean

from stages.contract.errors import UserError


class ContainedScoring:
    """The scorer of one task. Counts the documents whose answers it could not score."""

    def __init__(self, task: Any) -> None:
        self.task = str(task.config.task)
        self.scored = self.failed = 0
        self._score, self._last = task.process_results, ""
        better = task.higher_is_better()
        # 0 is the lowest score only where more is better and scores are averaged; of another metric the document is left out.
        self._zero = {name: 0.0 for name, fold in task.aggregation().items() if fold is mean and better.get(name)}

    def __call__(self, document: Any, results: Any) -> dict[str, Any]:
        """Score one document's answers: 0 in every averaged metric when the task's scorer raises."""
        try:
            scores: dict[str, Any] = self._score(document, results)
        except Exception as error:  # noqa: BLE001 - another's program on a text that a model wrote
            self.failed, self._last = self.failed + 1, f"{type(error).__name__}: {error}"
            return self._zero
        self.scored += 1
        return scores

    def check(self) -> bool:
        """Report how many documents could not be scored, on standard error; return whether there are any.

        Raises UserError when no document could be scored: then the task must be at fault.
        """
        if self.failed and not self.scored:
            hint = "check the task's YAML: its target and its metrics have to fit its answers"
            raise UserError(f"the lm-eval task scored no answer ({self._last})", where=self.task, mend=hint)
        if self.failed:
            last = UserError(self._last, where=self.task)  # one printable line: an error may quote the answer
            print(f"warning: {self.failed} answers could not be scored and count 0: {last}", file=sys.stderr, flush=True)
        return self.failed > 0


def contain_scoring(task: Any) -> ContainedScoring:
    """Put a `ContainedScoring` in the place of a task's `process_results`, and return it."""
    scorer = ContainedScoring(task)
    task.process_results = scorer
    return scorer
