"""The verifiers by name: what judges a final answer, and answers whose verdicts are known (canaries).

A new one is a word in `Verifier` and a row in `VERIFIERS`; its module is imported when it is first asked.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from stages.problems.episode import Problem, Verdict
from stages.rewards.worker import load

if TYPE_CHECKING:
    from stages.rewards.settings import Rewards

Verifier = Literal["exact", "numeric", "math", "reasoning_gym", "code"]


class Asked(NamedTuple):
    """An answer to be judged."""

    problem: Problem
    answer: str
    """What the sampled text states as its final answer."""


class Judge(Protocol):
    """What a row of the table names: a verdict per answer, in order; `none` when there is none within the limits."""

    def __call__(self, asked: Sequence[Asked], rewards: "Rewards") -> list[Verdict]:
        """Judge them."""


@dataclass(frozen=True)
class Row:
    """A verifier."""

    judge: str
    """`module:function` of a `Judge`."""
    canaries: tuple[tuple[Asked, Verdict], ...]
    """Answers with known verdicts, right and wrong ones: judged now and then, they show that the verifier still works."""
    values: bool = True
    """Whether it compares an answer with the reference answer alone: then two sampled answers can be compared too."""


def _canaries(*rows: tuple[str, str, Verdict], metadata: str | None = None) -> tuple[tuple[Asked, Verdict], ...]:
    return tuple(
        (Asked(Problem(f"canary:{n}", "", reference, "canary", metadata), answer), verdict)
        for n, (reference, answer, verdict) in enumerate(rows)
    )


def _program(body: str) -> str:
    return f"```python\ndef f(x):\n    return {body}\n```"


_TESTS = json.dumps({"function": "f", "cases": [{"args": [1], "returns": 2}]})
_CHAIN = json.dumps({"source_dataset": "chain_sum"})

VERIFIERS: dict[str, Row] = {
    "exact": Row("stages.rewards.accuracy:exact", _canaries(("5", " 5 ", "right"), ("5", "6", "wrong"))),
    "numeric": Row(
        "stages.rewards.accuracy:numeric",
        _canaries(("5", "$5.00", "right"), ("5", "5 or 6", "wrong"), ("n/a", "5", "none")),
    ),
    "math": Row(
        "stages.rewards.accuracy:math",
        _canaries(
            ("5", "5.0", "right"),
            (r"\frac{1}{2}", "2/4", "right"),
            ("x+1", "1+x", "right"),
            ("x+1", "x+2", "wrong"),
            ("(1,2]", "[1,2]", "wrong"),
            ("5", "5, 6", "wrong"),
            (r"\pi", r"10^{10^{10^{10}}}", "none"),
        ),
    ),
    "reasoning_gym": Row(
        "stages.rewards.accuracy:reasoning_gym",
        _canaries(("5", "5", "right"), ("5", "6", "wrong"), metadata=_CHAIN),
        values=False,
    ),
    "code": Row(
        "stages.rewards.code:of_rewards",
        _canaries((_TESTS, _program("x + 1"), "right"), (_TESTS, _program("x + 2"), "wrong"), ("no tests", "x", "none")),
        values=False,
    ),
}
"""Name -> how it judges."""


def judge(asked: Sequence[Asked], rewards: "Rewards") -> list[Verdict]:
    """A verdict per answer, in order, by the rewards' verifier."""
    function: Judge = load(VERIFIERS[rewards.verifier].judge)
    return function(asked, rewards) if asked else []


def canaries_missed(rewards: "Rewards") -> list[str]:
    """The canaries whose verdict is not the known one, as sentences; none while the verifier works."""
    known = VERIFIERS[rewards.verifier].canaries
    found = judge([asked for asked, _ in known], rewards)
    return [
        f"`{asked.answer}` for `{asked.problem.answer}` is {verdict}, not {wanted}"
        for (asked, wanted), verdict in zip(known, found, strict=True)
        if verdict != wanted
    ]
