"""Which checkpoint to keep, and when a policy has collapsed: decided by held-out reward alone."""

from dataclasses import asdict, dataclass
from typing import Any

from stages.rl.settings import Collapse


@dataclass
class Selection:
    """The best held-out evaluation so far. Its fields go into the checkpoint."""

    best_step: int = 0
    """0: nothing was evaluated yet."""
    best_reward: float = float("-inf")
    collapsed: int = 0
    """Collapsed evaluations in a row."""

    def see(self, step: int, reward: float, collapse: Collapse) -> bool:
        """Take an evaluation in; returns whether it is the best so far (a tie goes to the later step)."""
        best = reward >= self.best_reward
        if best:
            self.best_step, self.best_reward = step, reward
        # Rewards may be negative; a share of a negative best would turn the comparison round.
        low = self.best_reward > 0 and reward < collapse.below * self.best_reward
        self.collapsed = self.collapsed + 1 if low else 0
        return best

    def stop(self, collapse: Collapse) -> bool:
        """Whether the policy counts as destroyed."""
        return self.collapsed >= collapse.patience

    def state(self) -> dict[str, Any]:
        """JSON values for the checkpoint (infinity has no JSON: nothing evaluated is None)."""
        return asdict(self) | {"best_reward": self.best_reward if self.best_step else None}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> "Selection":
        """What `state` said."""
        return cls(**state | {"best_reward": state["best_reward"] if state["best_step"] else float("-inf")})
