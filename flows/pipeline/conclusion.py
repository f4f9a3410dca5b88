"""The last lines of a run that is done: what its evaluations say in one sentence, and what to do next."""

import shlex
from pathlib import Path
from typing import Any

from flows.output import single_line
from flows.runs.record import FINISHED, RunRecord

TRAINED = ("rl", "sft")
"""Kinds that turn one model into another."""
CERTAIN = 2.0
"""Standard errors from which on a difference is called one."""


def learned(record: RunRecord) -> str:
    """One sentence: for each trained model how its accuracy compares with that of the model it started from.

    The errors of two models are taken as independent; the summary's paired differences are more exact. Without an evaluation
    of both, a count of the stages.
    """
    results = record.results()
    parts = [part for name in record.stages if (part := _compared(record, name, results))]
    if parts:
        return single_line("; ".join(parts)) + "."
    done = sum(stage["status"] in FINISHED for stage in record.stages.values())
    count = f"{done} of {len(record.stages)} stages are finished"
    return f"{count}; no evaluation compares a trained model with the one that it started from."


def _compared(record: RunRecord, name: str, results: dict[str, dict[str, float]]) -> str:
    before = _start(record.content["document"]["stages"], name)
    now, then = (results.get(model, {}).get("accuracy") for model in (name, before))
    if record.stages[name]["kind"] not in TRAINED or now is None or then is None:
        return ""
    errors = [results[model].get("accuracy_stderr") or 0.0 for model in (name, before)]
    steps = record.content["document"]["stages"].get(name, {}).get("steps")
    took = f" in {steps} steps" if steps else ""
    if abs(now - then) <= CERTAIN * sum(error**2 for error in errors) ** 0.5:
        return f"{name}: no change of accuracy beyond the sampling error{took} ({_percent(then)} in {before}, {_percent(now)})"
    return f"{name} {'raised' if now > then else 'lowered'} accuracy from {_percent(then)} ({before}) to {_percent(now)}{took}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _start(sections: dict[str, Any], name: str) -> str:
    """The stage whose model a training stage starts from; a gate hands on the model that it judges."""
    section = sections.get(name, {})
    source = str(section.get("policy") or section.get("model") or "")
    while sections.get(source, {}).get("kind") == "gate":
        source = str(sections[source]["model"])
    return source


def next_commands(record: RunRecord) -> list[str]:
    """Three commands, each with what it is for, in columns."""
    runs = record.folder.path.parents[1]
    place = "" if runs == Path("runs").absolute() else f" --runs {shlex.quote(str(runs))}"
    stages = {item["kind"]: name for name, item in record.stages.items() if item["status"] in FINISHED}
    run = record.name
    commands = []
    if sampled := next((stages[kind] for kind in ("rl", "evaluate_model", "curate") if kind in stages), None):
        commands.append((f"r1 rollouts {run} {sampled}{place}", "read what the model wrote"))
    if model := next((stages[kind] for kind in ("rl", "sft", "toy_base", "model") if kind in stages), None):
        commands.append((f"r1 sample {run} {model}{place}", "ask the model"))
    commands += [
        (f"r1 up{place}", "curves in MLflow, graph in Prefect"),
        (f"r1 report {run}{place}", "make the page again"),
        (f"r1 status {run}{place}", "its stages and their folders"),
    ]
    width = max(len(command) for command, _ in commands[:3])
    return [f"  {single_line(command.ljust(width))}  # {what}" for command, what in commands[:3]]
