"""The figures of a training step that are worth watching, as text."""

from stages.tracking.journal import Line

_SHOWN = {
    "reward/total": ("reward", "{:.2f}"),
    "reward/accuracy": ("accuracy", "{:.2f}"),
    "rollout/length": ("length", "{:.0f}"),
    "time/tokens_per_second": ("tokens/s", "{:.0f}"),
}


def figures(line: Line) -> str:
    """The figures of a step worth watching, as text.

    >>> figures(Line(1, 2, 0, {"reward/accuracy": 0.5, "rollout/length": 30.25, "train/loss": 1.0, "health/no_signal": 1.0}))
    'accuracy 0.50  length 30  alarm no_signal'
    """
    shown = [f"{label} {value}" for label, value in shown_figures(line).items()]
    return "  ".join([*shown, *(f"alarm {name}" for name in alarms(line))])


def shown_figures(line: Line) -> dict[str, str]:
    """Label -> text of each figure worth watching that the step has."""
    values = ((label, form, line.metrics.get(key)) for key, (label, form) in _SHOWN.items())
    return {label: form.format(value) for label, form, value in values if value is not None}


def alarms(line: Line) -> list[str]:
    """The alarms of a step, such as `no_signal`; stages/rewards/health.py says what they mean."""
    prefix, missed = "health/", "health/canaries_missed"
    return sorted(key.removeprefix(prefix) for key in line.metrics if key.startswith(prefix) and key != missed)
