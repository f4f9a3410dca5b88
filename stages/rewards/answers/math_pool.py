"""The comparison of expressions in killable processes, given only what is no hopeless computation."""

from stages.problems.episode import Verdict
from stages.rewards.answers.expression_size import too_big
from stages.rewards.answers.text import plain_text
from stages.rewards.verifier_pool.pool import Limits, Pool, Reply, shared_pool

MEMORY_LIMIT_BYTES = 2 << 30
"""Address space of a process beside what is loaded: a tower of powers asks for all there is."""
FUNCTION = "stages.rewards.answers.math_verify:judge"
_VERDICTS: dict[str, Verdict] = {"right": "right", "wrong": "wrong"}


class MathPool:
    """Judges pairs of expressions."""

    def __init__(self, limit_s: float, processes: int = 2, *, wall_s: float | None = None, shared: bool = False) -> None:
        """`limit_s`: seconds of processor time a pair may take; `wall_s`: by the clock, by default ten times as many."""
        limits = Limits(limit_s, wall_s or 10 * limit_s, MEMORY_LIMIT_BYTES)
        self.pool = shared_pool(FUNCTION, limits, processes) if shared else Pool(FUNCTION, limits, processes)

    def judge(self, pairs: list[tuple[str, str]]) -> list[Verdict]:
        """A verdict per (reference, answer), in order. Equal pairs are judged once."""
        hopeless = {text: too_big(plain_text(text)) for text in {text for pair in pairs for text in pair}}
        asked = [pair for pair in dict.fromkeys(pairs) if not (hopeless[pair[0]] or hopeless[pair[1]])]
        found = dict(zip(asked, map(verdict_of, self.pool.ask(asked)), strict=True))
        return [found.get(pair, "none") for pair in pairs]

    def end(self) -> None:
        """Kill the processes."""
        self.pool.end()


def verdict_of(reply: Reply) -> Verdict:
    """What a worker said; nothing, or anything else, is no verdict."""
    return _VERDICTS.get(reply.value, "none") if isinstance(reply.value, str) else "none"
