"""The verifiers by name: what judges a final answer, and answers whose verdicts are known (canaries).

A new one is a word in `Verifier` (stages/problems/episode.py) and a row in `VERIFIERS`; its module is imported when it is first
asked. A stage has one for all its problems (`rewards.verifier`), or a source of problems names its own.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

from stages.problems.episode import Problem, ProblemVerifier, Verdict, Verifier
from stages.rewards.verifier_pool.worker import load

if TYPE_CHECKING:
    from stages.rewards.settings import Rewards


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

VERIFIERS: dict[Verifier, Row] = {
    "exact": Row("stages.rewards.answers.judges:exact", _canaries(("5", " 5 ", "right"), ("5", "6", "wrong"))),
    "numeric": Row(
        "stages.rewards.answers.judges:numeric",
        _canaries(("5", "$5.00", "right"), ("5", "5 or 6", "wrong"), ("n/a", "5", "none")),
    ),
    "math": Row(
        "stages.rewards.answers.judges:math",
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
        "stages.rewards.answers.judges:reasoning_gym",
        _canaries(("5", "5", "right"), ("5", "6", "wrong"), metadata=_CHAIN),
        values=False,
    ),
    "code": Row(
        "stages.rewards.code.verifier:of_rewards",
        _canaries((_TESTS, _program("x + 1"), "right"), (_TESTS, _program("x + 2"), "wrong"), ("no tests", "x", "none")),
        values=False,
    ),
}
"""Name -> how it judges."""


def used(named: Iterable[ProblemVerifier | None], default: Verifier) -> list[Verifier]:
    """The verifiers that judge, in the table's order. `named`: what sources or problems ask for; None: the stage's, `default`.

    >>> used([None, "code", "unjudged"], "math")
    ['math', 'code']
    """
    wanted = {name or default for name in named}
    return [name for name in VERIFIERS if name in wanted]


def judge(asked: Sequence[Asked], rewards: "Rewards") -> list[Verdict]:
    """A verdict per answer, in order: by its problem's own verifier, or else by the rewards'.

    Each verifier is given all of its answers at once, so that its processes share them; one verifier works after the other.
    """
    found: list[Verdict] = ["unjudged"] * len(asked)
    for name in used((a.problem.verifier for a in asked), rewards.verifier):
        function: Judge = load(VERIFIERS[name].judge)
        mine = [n for n, a in enumerate(asked) if (a.problem.verifier or rewards.verifier) == name]
        for n, verdict in zip(mine, function([asked[n] for n in mine], rewards), strict=True):
            found[n] = verdict
    return found


def canaries_missed(rewards: "Rewards", verifiers: Iterable[Verifier] | None = None) -> list[str]:
    """The canaries whose verdict is not the known one, as sentences; none while the verifiers work.

    verifiers: those that the stage uses; None: the rewards' alone.
    """
    names = [rewards.verifier] if verifiers is None else verifiers
    known = [canary for name in names for canary in _own_canaries(name)]
    found = judge([asked for asked, _ in known], rewards)
    return [
        f"`{asked.answer}` for `{asked.problem.answer}` is {verdict}, not {wanted}"
        for (asked, wanted), verdict in zip(known, found, strict=True)
        if verdict != wanted
    ]


def _own_canaries(name: Verifier) -> list[tuple[Asked, Verdict]]:
    """A verifier's canaries, which name it: they are judged by it whatever the stage's own is."""
    canaries = VERIFIERS[name].canaries
    return [(asked._replace(problem=replace(asked.problem, verifier=name)), verdict) for asked, verdict in canaries]
