"""Whether a stage has learned anything: what its journal and its weights say at the end, and what to try if not.

A policy gradient needs rewards that differ within a group. An RL stage whose rewards never do runs to its end like any other,
and hands on the model that it was given. Everything here is a pure function of the journal's metrics, so a resumed stage says
what an uninterrupted one would have said.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

Metrics = Mapping[str, float]
Outcome = Literal["learned", "no_signal", "unchanged", "format_only", "flat_loss"]
"""`learned`: nothing speaks against it. The others are what MLflow's tag `r1.learning` says."""
NEARLY_ALL = 0.999
FEWEST_STEPS = 8
"""Steps of a curve whose beginning and end are compared."""


@dataclass(frozen=True)
class Learning:
    """What is to be said of a finished stage."""

    outcome: Outcome
    sentence: str
    """Empty where nothing needs to be said."""
    steps: int
    without_signal: int = 0
    """Steps in which no group had one."""
    groups_without_signal: int = 0
    """Over all steps."""

    @property
    def failed(self) -> bool:
        """Whether the model handed on is as good as the one that came in."""
        return self.outcome in ("no_signal", "unchanged")

    def note(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "outcome": self.outcome,
            "sentence": self.sentence,
            "steps": self.steps,
            "steps_without_signal": self.without_signal,
            "groups_without_signal": self.groups_without_signal,
        }


def has_signal(step: Metrics) -> bool | None:
    """Whether the rewards of some group of a step differ; None where the metrics do not say.

    With one answer to a problem, and in PPO, where a value model stands in for the group: whether any two answers' differ.

    >>> has_signal({"rollout/zero_variance": 1.0}), has_signal({"rollout/zero_variance": 0.75}), has_signal({})
    (False, True, None)
    """
    if "rollout/zero_variance" in step and "value/mean" not in step:
        return step["rollout/zero_variance"] < 1
    return step["reward/std"] > 0 if "reward/std" in step else None


def rl_learning(
    steps: Iterable[Metrics],
    *,
    unchanged: bool,
    functions: Sequence[str] = (),
    format_gain: float | None = 0.1,
    flat: float = 0.02,
) -> Learning:
    """What an RL stage has learned.

    Args:
        steps: metrics of every step, in order.
        unchanged: whether the model's weights are those that the stage started from.
        functions: names of the user's reward functions.
        format_gain: rise of the format reward between the stage's halves from which on it is what was learned; None: never.
        flat: rise of accuracy up to which it counts as flat.

    Returns:
        The outcome, and a sentence for whoever sees the results.

    >>> rl_learning([{"rollout/zero_variance": 1.0, "reward/accuracy": 1.0}] * 4, unchanged=True).sentence
    'no group had a signal in 4 of 4 steps: the model is unchanged; every answer was right: give harder problems'

    """
    every = list(steps)
    signals = [signal for step in every if (signal := has_signal(step)) is not None]
    without = signals.count(False)
    groups = round(sum(step.get("rollout/zero_signal_groups", 0.0) for step in every))
    counts = (len(every), without, groups)
    hints = _hints(every, functions)
    if every and without == len(every):
        what = "the model is unchanged" if unchanged else "only other terms of the loss moved the weights"
        return Learning(
            "no_signal", "; ".join([f"no group had a signal in {without} of {len(every)} steps: {what}", *hints]), *counts
        )
    if unchanged:
        what = f"the model is unchanged: its weights are those that the stage started from, after {len(every)} steps"
        hint = "look at train/grad_norm, train/updates and the learning rate"
        return Learning("unchanged", f"{what}, {without} of which had no group with a signal; {hint}", *counts)
    if gained := _format_only(every, format_gain, flat):
        return Learning("format_only", gained, *counts)
    if 2 * without > len(every):
        sentence = f"no group had a signal in {without} of {len(every)} steps"
        return Learning("learned", "; ".join([sentence, *hints]), *counts)
    return Learning("learned", "", *counts)


def sft_learning(steps: Iterable[Metrics], *, unchanged: bool) -> Learning:
    """What supervised training has learned, from the loss of each step and the weights.

    >>> sft_learning([{"train/loss": 2.0}] * 8, unchanged=False).outcome
    'flat_loss'
    """
    losses = [step["train/loss"] for step in steps if "train/loss" in step]
    if unchanged:
        what = f"the model is unchanged: its weights are those that the stage started from, after {len(losses)} steps"
        return Learning("unchanged", f"{what}; look at train/grad_norm and the learning rate", len(losses))
    quarter = len(losses) // 4
    if len(losses) >= FEWEST_STEPS and (last := fmean(losses[-quarter:])) >= (first := fmean(losses[:quarter])):
        what = f"the loss did not fall: {first:.3f} in the first quarter of {len(losses)} steps, {last:.3f} in the last"
        return Learning("flat_loss", f"{what}; raise the learning rate, or look at the data", len(losses))
    return Learning("learned", "", len(losses))


def _hints(steps: Sequence[Metrics], functions: Sequence[str]) -> list[str]:
    """What to try, from what was seen."""
    hints = []
    silent = [name for name in functions if steps and not any(f"reward/{name}" in step for step in steps)]
    if silent:
        names = ", ".join(f"`rewards.functions.{name}`" for name in silent)
        hints.append(f"{names} had no value for any answer: look at what it returns")
    truncated, accuracy, form = (_mean(steps, name) for name in ("rollout/truncated", "reward/accuracy", "reward/format"))
    verdictless = _mean(steps, "rollout/no_verdict")
    if truncated is not None and truncated > NEARLY_ALL:
        return [*hints, "every answer was cut at the limit: raise `sampling.max_tokens`"]
    if verdictless is not None and verdictless > NEARLY_ALL:
        return [*hints, "no answer had a verdict: look at the reference answers and `rewards.verifier`"]
    if accuracy is not None and accuracy == 0:
        if form == 0:
            what = "no answer was right, and none had the format: show it with `template.examples`, or take another `template`"
            return [*hints, f"{what}; a base model may need a cold start (SFT) first"]
        what = "no answer was right: give easier problems (`pass_rate` chooses them), worked examples (`template.examples`)"
        return [*hints, f"{what}, more `samples` for each problem, or another `template`"]
    if accuracy is not None and accuracy > NEARLY_ALL:
        return [*hints, "every answer was right: give harder problems"]
    if not hints:
        hints.append("the answers to each problem earn the same: raise `samples` or `sampling.temperature`")
    return hints


def _format_only(steps: Sequence[Metrics], format_gain: float | None, flat: float) -> str:
    """A sentence where the format rose between the halves and accuracy did not; else nothing."""
    half = len(steps) // 2
    if format_gain is None or len(steps) < FEWEST_STEPS:
        return ""
    gains = []
    for name in ("reward/format", "reward/accuracy"):
        before, after = _mean(steps[:half], name), _mean(steps[half:], name)
        if before is None or after is None:
            return ""
        gains.append(after - before)
    form, accuracy = gains
    if form < format_gain or accuracy > flat:
        return ""
    what = f"only the format was learned: it rose by {form:.2f} from the first to the second half of {len(steps)} steps"
    while_flat = f"while accuracy rose by {accuracy:.2f}".replace("rose by -", "fell by ")
    return f"{what} {while_flat}; weigh `rewards.format` less, or give easier problems"


def _mean(steps: Sequence[Metrics], name: str) -> float | None:
    values = [step[name] for step in steps if name in step]
    return fmean(values) if values else None
