"""The accuracy reward: is the final answer the reference answer (DeepSeek-R1, section 2.2).

Three verifiers. `exact` compares texts, `numeric` compares numbers exactly, `math` compares mathematical expressions with
math-verify. A verdict `none` (no verdict within the limit, a reference that cannot be read) is kept apart from `wrong`.
"""

import atexit
import functools
import re
from typing import Literal

from stages.problems.episode import Verdict
from stages.rewards.math_pool import MathPool
from stages.rewards.numbers import parse_number

Verifier = Literal["exact", "numeric", "math"]

PROCESSES = 2
"""Processes of math-verify; most answers are plain numbers and never reach them."""
LONGEST_EXPRESSION = 1000
"""Characters; a longer answer is wrong without being looked at."""
_PLAIN = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")
_TWO_NUMBERS = re.compile(r"[0-9]\s+[0-9]+(?!\s*/)")


def verdicts(pairs: list[tuple[str, str]], verifier: Verifier, *, timeout_s: float) -> list[Verdict]:
    """A verdict per (reference, answer), in order. `timeout_s`: seconds per pair, for `math` only."""
    if verifier == "exact":
        return ["right" if _normal(reference) == _normal(answer) else "wrong" for reference, answer in pairs]
    if verifier == "numeric":
        return [_numeric(reference, answer) for reference, answer in pairs]
    quick = [_quick(reference, answer) for reference, answer in pairs]
    hard = [pair for pair, verdict in zip(pairs, quick, strict=True) if verdict is None]
    judged = iter(_pool(timeout_s).judge(hard) if hard else [])
    return [next(judged) if verdict is None else verdict for verdict in quick]


def _normal(text: str) -> str:
    return " ".join(text.split())


def _numeric(reference: str, answer: str) -> Verdict:
    wanted = parse_number(reference)
    if wanted is None:
        return "none"
    return "right" if parse_number(answer) == wanted else "wrong"


def _quick(reference: str, answer: str) -> Verdict | None:
    """The verdict where no algebra is needed, else None."""
    if _normal(reference) == _normal(answer):
        return "right"
    if len(answer) > LONGEST_EXPRESSION:
        return "wrong"
    if _PLAIN.fullmatch(reference.strip()):
        if parse_number(answer) == parse_number(reference):
            return "right"
        if _PLAIN.fullmatch(answer):
            return "wrong"
        # math-verify reads `2 3` as 2 + 3: numbers side by side are several answers, except in `1 1/2`.
        if _TWO_NUMBERS.search(answer):
            return "wrong"
    return None


@functools.cache
def _pool(timeout_s: float) -> MathPool:
    pool = MathPool(timeout_s, PROCESSES)
    atexit.register(pool.end)
    return pool
