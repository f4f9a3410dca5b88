"""reasoning-gym's own scorers; runs in a worker process, because some of them compute what the answer says.

>>> score("1 + 4 = ?", "5", {"source_dataset": "chain_sum"}, "5")
'right'
>>> score("?", "5", {"source_dataset": "countdown", "numbers": [2, 3], "target": 5}, "open('f')")
'wrong'
"""

from typing import Any

from stages.problems.gym import gym_score
from stages.rewards.gym_guard import refused


def warm() -> None:
    """Import it before the first limit runs."""
    import reasoning_gym  # noqa: F401


def score(question: str, reference: str, metadata: dict[str, Any], answer: str) -> str:
    """`right` for the full mark of the task `metadata["source_dataset"]`, else `wrong`; what cannot be scored raises.

    An answer that could only be an attack is wrong without being scored.
    """
    if refused(answer, metadata["source_dataset"]):
        return "wrong"
    return "right" if gym_score(question, reference, metadata, answer) >= 1.0 else "wrong"
