"""`r1 plan CONFIG`: what would run and what is reused, memory, tokens, hours and cost, before anything runs.

`r1 plan CONFIG --gpus 8,64,512`: the same on paper for several numbers of GPUs. `r1 plan --calibrate FOLDER`: learn this
machine's speed from runs that it has finished.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from flows.cli.plan_text import shown
from flows.doctor.checks import CALIBRATION, examine
from flows.doctor.finding import Finding
from flows.doctor.scope import Scope
from flows.plan.cost import Place, stage_cost, stage_memory
from flows.plan.counts import Counts
from flows.plan.reuse import Standing, standings
from flows.plan.shapes import model_shapes
from flows.runs.results import error_document
from flows.runs.stage_record import Finished
from stages.contract.errors import ExitStatus, UserError
from stages.costs.devices import Device, cpu_device, gpu_device, rates_of
from stages.costs.shape import Shape
from stages.costs.stage_time import Spent
from stages.recipe.resolve import ResolvedRecipe, load_recipe

ASSUMED = (
    "seconds are a sum of amounts of work times seconds per unit; nothing overlaps but ZeRO-3's exchange and its arithmetic",
    "every group carries a signal; no stage stops early; answers' lengths fall off exponentially up to the limit",
    "stages run one after the other; a GPU is paid for while it waits",
)


def plan(options: argparse.Namespace) -> tuple[ExitStatus, dict[str, Any] | None]:
    """`r1 plan`."""
    if options.calibrate is not None:
        from flows.cli.calibrate import calibrate

        return calibrate(options)
    if options.config is None:
        raise UserError("no recipe is named", where="plan", mend="r1 plan CONFIG, or r1 plan --calibrate FOLDER")
    recipe = load_recipe(options.config, options.overrides)
    standing, finished = standings(recipe)
    document = planned(recipe, options, standing, finished)
    findings = _looked_at(recipe, options, standing, finished)
    document["checks"] = [vars(finding) for finding in findings if finding.state != "ok"]
    if not options.json:
        print(shown(document))
    mistakes = [finding.error() for finding in findings if finding.state == "fail" and finding.about == "recipe"]
    if not mistakes:
        return ExitStatus.DONE, document
    first = mistakes[0]
    print(f"r1: {first}", file=sys.stderr)
    return ExitStatus.MISTAKE, document | error_document(ExitStatus.MISTAKE, first.what, first.where, first.mend)


def _looked_at(
    recipe: ResolvedRecipe, options: argparse.Namespace, standing: dict[str, Standing], finished: dict[str, Finished]
) -> list[Finding]:
    """What `r1 run` would look at before it computes anything."""
    scope = Scope(
        recipe,
        {name: config for name, config in recipe.stages.items() if standing[name].state != "reused"},
        finished,
        options.config,
        execute=not options.no_code,
        note=lambda line: print(line, file=sys.stderr, flush=True),
        model_configs=_files(options.model_config),
    )
    return list(examine(scope))


def planned(
    recipe: ResolvedRecipe, options: argparse.Namespace, standing: dict[str, Standing], finished: dict[str, Finished]
) -> dict[str, Any]:
    """The plan as one document."""
    shapes = model_shapes(recipe, finished, _files(options.model_config))
    device = _device(options, shapes, recipe.runs)
    counts = Counts(recipe, finished, options.length)
    sizes: list[int | None] = list(options.gpus or [None])
    price = options.price if options.price is not None else (device.gpu.price if device.gpu else 0.0)
    places = [Place(device, size, options.layout == "resident", options.speculation) for size in sizes]
    scale = [_scaled(recipe, standing, shapes, counts, place, price) for place in places] if len(places) > 1 else []
    # In detail: the first number of GPUs that holds everything, or the largest.
    detail = next((place for place, entry in zip(places, scale, strict=False) if entry["fits"]), places[-1])
    stages = []
    for name, config in recipe.stages.items():
        facts: dict[str, Any] = {"stage": name, **vars(standing[name])}
        todo = standing[name].state != "reused"
        spent = stage_cost(name, config, shapes.get(name), counts, detail) if todo else Spent()
        facts |= _told(spent, detail.processes(config), price)
        if todo:
            memory = stage_memory(config, shapes.get(name), detail)
            facts["parameters"] = shapes[name][0].parameters if name in shapes else None
            facts["deepspeed"] = getattr(config, "deepspeed", None)
            facts["memory"] = {layout: {**vars(parts), "total": parts.total} for layout, parts in memory.items()}
        stages.append(facts)
    assumptions = [*ASSUMED, *counts.assumptions, *_assumed(detail, price)]
    return {
        "recipe": recipe.name,
        "device": {"name": device.name, "memory": device.memory, "rates": device.source, "price": price},
        "gpus": detail.gpus,
        "stages": stages,
        "total": _sum(stages),
        "scale": scale,
        "assumptions": assumptions,
    }


def _scaled(
    recipe: ResolvedRecipe, standing: dict[str, Any], shapes: dict[str, Any], counts: Counts, place: Place, price: float
) -> dict[str, Any]:
    """All stages that are to run, on so many GPUs."""
    whole = Spent()
    fits = True
    for name, config in recipe.stages.items():
        if standing[name].state == "reused":
            continue
        spent = stage_cost(name, config, shapes.get(name), counts, place)
        whole.tokens += spent.tokens
        for part, seconds in spent.seconds.items():
            whole.add(part, seconds)
        memory = stage_memory(config, shapes.get(name), place)
        if memory and place.device.gpu:
            chosen = _chosen(memory, getattr(config, "deepspeed", "zero0"), resident=place.resident)
            fits = fits and chosen <= place.device.memory
    return {"gpus": place.gpus, "fits": fits, **_told(whole, place.gpus or 1, price)}


def _chosen(memory: dict[str, Any], layout: str, *, resident: bool) -> float:
    """Bytes under the layout that the stage asks for (the same as ZeRO-3's states where weights stay where they are)."""
    if resident:
        parts = memory["zero3"]
        return float(parts.weights + parts.gradients + parts.optimizer)
    return float(memory[layout].total) if layout in memory else 0.0


def _told(spent: Spent, processes: int, price: float) -> dict[str, Any]:
    hours = spent.total / 3600
    cost = hours * processes * price
    return {"hours": hours, "cost": cost, "tokens": spent.tokens, "processes": processes, "seconds": spent.seconds}


def _sum(stages: list[dict[str, Any]]) -> dict[str, float]:
    return {key: sum(stage[key] for stage in stages) for key in ("hours", "cost", "tokens")}


def _device(options: argparse.Namespace, shapes: dict[str, tuple[Shape, int]], runs: Path) -> Device:
    """What `--gpu` names; by default the CPU for a recipe in float32, an H100 for one in bfloat16."""
    import psutil

    rates, source = rates_of(runs / CALIBRATION)
    name = options.gpu or ("h100" if any(item == 2 for _, item in shapes.values()) else "cpu")
    if name == "cpu":
        return cpu_device(rates, float(psutil.virtual_memory().total), source)
    return gpu_device(name, rates)


def _assumed(place: Place, price: float) -> list[str]:
    found = [f"seconds per unit: {place.device.source}"]
    if place.device.gpu is not None:
        found += [f"a GPU hour costs {price:g} (set --price)", "evaluation and curation use all GPUs, if --gpus says how many"]
    if place.resident:
        found.append("weights stay where they are (--layout resident): this code does not do that, it has ZeRO")
    if place.speculation > 1:
        found.append(f"a step of decoding gives {place.speculation:g} tokens (--speculation); this code's gives 1")
    return found


def _files(given: list[str]) -> dict[str, Path]:
    found = {}
    for text in given:
        stage, equals, file = text.partition("=")
        if not equals:
            raise UserError(
                f"`{text}` is not STAGE=FILE", where="--model-config", mend="for example --model-config base=config.json"
            )
        found[stage] = Path(file)
    return found
