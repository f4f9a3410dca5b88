"""Health of the rewards in training: what its numbers say when a policy games them or a verifier fails.

Every check is a pure function of the metrics of the last steps, so that a resumed stage, which reads them from its journal,
sees what it would have seen. The paper names reward hacking as a limit of its reward models (section 6); these are its
rule-based kin: format learned without accuracy, answers that only grow, several answers at once, verifiers that do not answer.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Annotated, Literal

from pydantic import Field

from stages.contract.config import ADDED, Config
from stages.rewards.learning import has_signal

AlarmName = Literal["no_verdict", "canary", "several_answers", "format_gain", "length_factor", "no_signal"]
Metrics = Mapping[str, float]
CANARIES = "health/canaries_missed"


class Health(Config):
    """When to warn of what the rewards' numbers say; null switches an alarm off."""

    window: int = Field(default=20, ge=4)
    """Steps that are looked at; nothing but `canary` is said before there are so many."""
    no_verdict: float | None = Field(default=0.1, ge=0, le=1)
    """Mean share of answers without verdict above which the verifier is not doing its work."""
    several_answers: float | None = Field(default=0.1, ge=0, le=1)
    """Mean share of answers that state several final answers."""
    format_gain: float | None = Field(default=0.1, gt=0)
    """Rise of the format reward from the window's first half to its second while accuracy is flat."""
    length_factor: float | None = Field(default=1.5, gt=1)
    """Growth (or, inverted, shrinking) of the mean length between the halves while accuracy is flat."""
    no_signal: Annotated[float | None, ADDED] = Field(default=1.0, gt=0, le=1)
    """Share of steps without a signal, in which the rewards of every group are all equal, from which on nothing is learned."""
    flat: float = Field(default=0.02, ge=0)
    """Rise of accuracy between the halves up to which it counts as flat."""
    canary_every: int = Field(default=25, ge=0)
    """Steps after which the verifier judges answers whose verdicts are known; 0: never."""
    stop: tuple[AlarmName, ...] = ()
    """Alarms that stop the stage, after a checkpoint; the others warn. `no_signal` also refuses a stage that ends, however
    short it is, without a signal in any step or with the weights that it started from."""


def alarms(steps: Sequence[Metrics], health: Health) -> dict[AlarmName, str]:
    """The alarms of the last of these steps, each with a sentence. `steps`: metrics by name, the oldest first.

    >>> hacked = [{"reward/format": step / 20, "reward/accuracy": 0.3} for step in range(20)]
    >>> alarms(hacked, Health())
    {'format_gain': 'format rose by 0.50 in 20 steps while accuracy rose by 0.00'}
    """
    found: dict[AlarmName, str] = {}
    if steps and (missed := steps[-1].get(CANARIES)):
        found["canary"] = f"the verifier misjudged {missed:.0f} answers whose verdicts are known"
    window = steps[-health.window :]
    if len(window) < health.window:
        return found
    for name, what in (("no_verdict", "have no verdict"), ("several_answers", "state several final answers")):
        limit, share = getattr(health, name), _mean(window, f"rollout/{name}")
        if limit is not None and share is not None and share > limit:
            found[name] = f"{share:.0%} of the answers of {len(window)} steps {what}"  # type: ignore[index]
    signals = [signal for step in window if (signal := has_signal(step)) is not None]
    if health.no_signal is not None and len(signals) == len(window):
        without = signals.count(False)
        if without >= health.no_signal * len(window):
            found["no_signal"] = f"no group had a signal in {without} of the last {len(window)} steps"
    return found | _drifts(window, health)


def _drifts(window: Sequence[Metrics], health: Health) -> dict[AlarmName, str]:
    """What moved between the halves of the window while accuracy did not rise."""
    half = len(window) // 2
    found: dict[AlarmName, str] = {}
    accuracy = _gain(window, half, "reward/accuracy")
    if accuracy is None or accuracy > health.flat:
        return found
    while_flat = f"in {len(window)} steps while accuracy rose by {accuracy:.2f}".replace("rose by -", "fell by ")
    gain = _gain(window, half, "reward/format")
    if health.format_gain is not None and gain is not None and gain >= health.format_gain:
        found["format_gain"] = f"format rose by {gain:.2f} {while_flat}"
    before, after = _mean(window[:half], "rollout/length"), _mean(window[half:], "rollout/length")
    if health.length_factor is not None and before and after:
        factor = after / before
        if not 1 / health.length_factor < factor < health.length_factor:
            found["length_factor"] = f"the mean length went from {before:.0f} to {after:.0f} tokens {while_flat}"
    return found


def _gain(window: Sequence[Metrics], half: int, name: str) -> float | None:
    before, after = _mean(window[:half], name), _mean(window[half:], name)
    return None if before is None or after is None else after - before


def _mean(steps: Sequence[Metrics], name: str) -> float | None:
    values = [step[name] for step in steps if name in step]
    return fmean(values) if values else None


class Watch:
    """Looks at each step of a stage, on the rank that writes the journal."""

    def __init__(self, health: Health, earlier: Iterable[Metrics], canaries: Callable[[], list[str]]) -> None:
        """`earlier`: metrics of the journal's steps so far; `canaries`: sentences of those that were misjudged."""
        self._health, self._canaries = health, canaries
        self._steps: deque[Metrics] = deque(earlier, maxlen=health.window)
        self.stopping = ""
        """Why the stage should stop, after the step that says so."""

    def see(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Further metrics of finished step `step`: misjudged canaries, and 1 for each alarm. New alarms are told on stderr."""
        health, found = self._health, dict[str, float]()
        if health.canary_every and step % health.canary_every == 0:
            missed = self._canaries()
            found[CANARIES] = float(len(missed))
            for sentence in missed:
                _tell(step, sentence)
        before = alarms(list(self._steps), health)
        self._steps.append({**metrics, **found})
        now = alarms(list(self._steps), health)
        for name, sentence in now.items():
            if name not in before:
                _tell(step, f"{sentence} ({name})")
        stopping = [sentence for name, sentence in now.items() if name in health.stop]
        self.stopping = f"stopped at step {step}: {'; '.join(stopping)}" if stopping else ""
        return found | {f"health/{name}": 1.0 for name in now}


def summary(steps: Iterable[Metrics]) -> list[str]:
    """What to say of a finished stage: how many of its steps had which alarm."""
    counts: dict[str, int] = {}
    for metrics in steps:
        for name in metrics:
            if name.startswith("health/") and name != CANARIES:
                counts[name] = counts.get(name, 0) + 1
    return [f"rewards: alarm `{name.removeprefix('health/')}` in {count} steps" for name, count in counts.items()]


def _tell(step: int, sentence: str) -> None:
    print(f"step {step}: warning: {sentence}", file=sys.stderr, flush=True)
