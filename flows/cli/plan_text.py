"""A plan as text for people: what runs, what it takes, where the time goes, what was assumed."""

from typing import Any

from flows.doctor.capacity import fit_line
from flows.doctor.finding import Finding, line_of
from flows.output import table

GB = 1e9
PARTS = ("sampling", "waiting", "update", "optimizer", "exchange", "weights", "evaluation", "other")
"""Where time goes; `waiting`: answers' seats that are empty while the longest go on."""


def shown(document: dict[str, Any]) -> str:
    """All of it."""
    device = document["device"]
    blocks = [_stages(document["stages"], document["total"], device)]
    blocks += [text for stage in document["stages"] for text in _remarks(stage)]
    if memory := _memory(document["stages"]):
        place = "of a process" if device["name"] == "cpu" else f"of a GPU of {device['memory'] / GB:.0f} GB"
        blocks.append(f"memory {place} at the peak of an update, GB (* what the recipe asks for)\n{memory}")
    if document["scale"]:
        blocks.append(_scale(document["scale"]))
    blocks.append("assumed:\n" + "\n".join(f"- {text}" for text in document["assumptions"]))
    findings = [Finding(**check) for check in document["checks"]]
    capacity = fit_line(findings)
    if others := [finding for finding in findings if finding.found not in capacity]:
        blocks.append("\n".join(line_of(finding) for finding in others))
    if capacity:
        blocks.append(capacity)
    return "\n\n".join(blocks)


def _stages(stages: list[dict[str, Any]], total: dict[str, float], device: dict[str, Any]) -> str:
    paid = device["price"] > 0
    head = ["stage", "kind", "", device["name"], "tokens", "time", *(["cost"] if paid else []), "where the time goes"]
    rows = []
    for stage in stages:
        state = stage["state"] + _after(stage["waits_for"])
        row = [stage["stage"], stage["kind"], state]
        if stage["state"] == "reused":
            rows.append([*row, "", "", "", *([""] if paid else []), ""])
            continue
        figures = [str(stage["processes"]), _tokens(stage["tokens"]), _time(stage["hours"])]
        cost = [f"{stage['cost']:,.0f}"] if paid else []
        rows.append([*row, *figures, *cost, _shares(stage["seconds"])])
    rows.append(
        ["all", "", "", "", _tokens(total["tokens"]), _time(total["hours"]), *([f"{total['cost']:,.0f}"] if paid else []), ""]
    )
    return table(head, rows, right=False)


def _after(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f" after {', '.join(names[:2])}{more}" if names else ""


def _remarks(stage: dict[str, Any]) -> list[str]:
    found = [f"warning: {stage['stage']}: {text}" for text in stage["warnings"]]
    found += [f"{stage['stage']}: computed again: {text}" for text in stage["reasons"]]
    if stage["state"] == "running":
        found.append(f"{stage['stage']}: another pipeline works in {stage['folder']}; `r1 run` would wait for it")
    return found


def _memory(stages: list[dict[str, Any]]) -> str:
    trained = [stage for stage in stages if stage.get("memory")]
    if not trained:
        return ""
    layouts = list(trained[0]["memory"])
    rows = [
        [
            stage["stage"],
            f"{stage['parameters'] / 1e9:.3g}e9",
            *(f"{stage['memory'][name]['total'] / GB:,.1f}" + ("*" if stage["deepspeed"] == name else "") for name in layouts),
        ]
        for stage in trained
    ]
    return table(["stage", "weights", *layouts], rows)


def _scale(scale: list[dict[str, Any]]) -> str:
    first = next((entry for entry in scale if entry["fits"]), None)
    rows = []
    for entry in scale:
        spent = sum(entry["seconds"].values())
        ideal = "-"
        if first and entry["fits"]:
            ideal = f"{first['hours'] * first['gpus'] / max(entry['hours'] * entry['gpus'], 1e-12):.0%}"
        parts = [f"{entry['seconds'].get(part, 0.0) / max(spent, 1e-12):.0%}" for part in PARTS]
        fits = "yes" if entry["fits"] else "no"
        rows.append([str(entry["gpus"]), fits, f"{entry['hours']:,.1f}", ideal, f"{entry['cost']:,.0f}", *parts])
    text = "on paper: all stages that are to run, on so many GPUs each (efficiency against the first that fits)\n"
    return text + table(["gpus", "fits", "hours", "efficiency", "cost", *PARTS], rows)


def _shares(seconds: dict[str, float]) -> str:
    total = sum(seconds.values())
    parts = sorted(((value / max(total, 1e-12), part) for part, value in seconds.items()), reverse=True)
    return ", ".join(f"{part} {share:.0%}" for share, part in parts[:3] if share >= 0.01)


def _tokens(count: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}" if count else ""


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"
