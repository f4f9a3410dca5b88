r"""The accuracy reward: is the final answer the reference answer (DeepSeek-R1, section 2.2).

`exact` compares texts, `numeric` compares numbers exactly, `math` compares mathematics: rationals exactly, the decimals of an
irrational to 7 digits, sets as sets, tuples in order (see math_verify.py),
`reasoning_gym` asks the scorer of the task that made the problem. A verdict `none` (no verdict within the limit, a reference
that cannot be read) is kept apart from `wrong`. A problem may name a verifier of its own; see verifiers.py.

>>> verdicts([("5", " 5"), ("5", "5.0")], "exact")
['right', 'wrong']
>>> verdicts([("5", "5.0"), ("5", "5 or 6"), ("n/a", "5")], "numeric")
['right', 'wrong', 'none']
>>> verdicts([("1200", "$1,200"), ("5", "5, 6")], "math")
['right', 'wrong']
"""

import json
import re
from collections.abc import Sequence
from fractions import Fraction

from stages.problems.episode import Problem, Verdict, Verifier
from stages.rewards.answers.math_pool import MathPool, verdict_of
from stages.rewards.answers.numbers import parse_amount, parse_number
from stages.rewards.answers.verifiers import Asked, judge
from stages.rewards.settings import Rewards
from stages.rewards.verifier_pool.pool import shared_pool

LONGEST_EXPRESSION = 1000
"""Characters; a longer answer is wrong without being looked at, unless it is the reference word for word."""
_PLAIN = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")


def verdicts(pairs: Sequence[tuple[str, str]], verifier: Verifier, **settings: float) -> list[Verdict]:
    """A verdict per (reference, answer), in order. `settings`: further fields of `Rewards`, such as `verify_timeout_s`."""
    asked = [Asked(Problem("", "", reference, ""), answer) for reference, answer in pairs]
    return judge(asked, Rewards.model_validate({"verifier": verifier, **settings}))


def exact(asked: Sequence[Asked], rewards: Rewards) -> list[Verdict]:  # noqa: ARG001 - a `Judge`
    """Right when the texts are the same but for whitespace."""
    return ["right" if _normal(a.problem.answer) == _normal(a.answer) else "wrong" for a in asked]


def numeric(asked: Sequence[Asked], rewards: Rewards) -> list[Verdict]:  # noqa: ARG001 - a `Judge`
    """Right when both state the same number."""
    return [_numeric(a.problem.answer, a.answer) for a in asked]


def math(asked: Sequence[Asked], rewards: Rewards) -> list[Verdict]:
    """Right when both state the same mathematics; what needs no algebra is decided without it."""
    pairs = [(a.problem.answer, a.answer) for a in asked]
    quick = [_quick(*pair) for pair in pairs]
    # With a long answer only the reference is read: if that cannot be done, nothing is known of the answer either.
    short = [(reference, answer if len(answer) <= LONGEST_EXPRESSION else "") for reference, answer in pairs]
    hard = [pair for pair, verdict in zip(short, quick, strict=True) if verdict is None]
    limits = rewards.limits()
    pool = MathPool(limits.cpu_s, rewards.verify_processes, wall_s=limits.wall_s, shared=True)
    judged = iter(pool.judge(hard) if hard else [])
    return [next(judged) if verdict is None else verdict for verdict in quick]


def reasoning_gym(asked: Sequence[Asked], rewards: Rewards) -> list[Verdict]:
    """Right when the scorer of the problem's own task gives its full mark.

    `Problem.metadata` is the `metadata` of reasoning-gym's item as JSON, whose `source_dataset` names the task. A problem
    without it has no verdict.
    """
    pool = shared_pool("stages.rewards.gym:score", rewards.limits(), rewards.verify_processes)
    replies = iter(
        pool.ask([[p.question, p.answer, json.loads(p.metadata), answer] for p, answer in asked if p.metadata is not None])
    )
    return ["none" if a.problem.metadata is None else verdict_of(next(replies)) for a in asked]


def _normal(text: str) -> str:
    return " ".join(text.split())


def _numeric(reference: str, answer: str) -> Verdict:
    expected, stated = parse_amount(reference), parse_amount(answer)
    if expected is None:
        return "none"
    if stated is None:
        return "wrong"
    # `50` may stand for 50% where the question asks for a percentage, and 0.5 is 50%.
    hundredths = [Fraction(1, 100) if amount.unit == "%" else Fraction(1) for amount in (expected, stated)]
    same = expected.value == stated.value or expected.value * hundredths[0] == stated.value * hundredths[1]
    return "right" if same else "wrong"


def _quick(reference: str, answer: str) -> Verdict | None:
    """The verdict where no algebra is needed, else None."""
    if _normal(reference) == _normal(answer) and answer.strip():
        return "right"
    if len(answer) > LONGEST_EXPRESSION:
        return "wrong" if _PLAIN.fullmatch(reference.strip()) else None
    if _PLAIN.fullmatch(reference.strip()):
        if parse_number(answer) == parse_number(reference):
            return "right"
        if _PLAIN.fullmatch(answer):
            return "wrong"
    return None
