"""A run's page: one HTML file that needs nothing else, no network, no script. Whatever a model or a user wrote is escaped."""

import datetime as dt
import shlex
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError
from pathlib import Path
from typing import Any

from stages.report import answers, models
from stages.report.curves import Panel, stage_panels
from stages.report.dag import layout
from stages.report.facts import Run, Stage, read_run
from stages.report.text import duration, percent, shown
from stages.store.files import write_bytes
from stages.store.folders import PipelineFolder

TEMPLATES = Path(__file__).parent / "templates"
MOST_STAGES = 80
"""Stages drawn and listed."""
MOST_CURVED = 16
"""Training stages whose curves are shown: the first ones."""
MOST_TEXT = 70_000
"""Characters of any text."""
MOST_CONFIG, MOST_REMARKS, MOST_REMARK = 60_000, 60, 600
"""Characters of the configuration; remarks, and characters of each."""


def write_page(
    folder: PipelineFolder, content: dict[str, Any] | None = None, needs: Mapping[str, Sequence[str]] | None = None
) -> tuple[Path, list[str]]:
    """Write `report.html` into the run's folder, whole; returns its path, and what could not be read.

    `content`, `needs`: as for `read_run`. Raises UserError when the run's record cannot be read.
    """
    run = read_run(folder, content, needs)
    path = folder.path / "report.html"
    write_bytes(path, render(run, folder.path.parents[1]).encode("utf-8", "replace"))
    return path, run.faults


def render(run: Run, runs: Path) -> str:
    """The page as text; `runs`: the runs folder."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "percent": percent, "shown": shown, "svg": _Drawer()}
    evaluated = models.evaluations(run)
    content = run.content
    stages = run.stages[:MOST_STAGES]
    return environment.get_template("report.html.j2").render(
        run=run,
        made=dt.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        seconds=sum(stage.seconds or 0.0 for stage in run.stages),
        stages=stages,
        left_out=len(run.stages) - len(stages),
        graph=_graph(stages),
        results=models.results(run),
        gates=[(stage.name, stage.manifest["notes"]["gate"]) for stage in stages if _notes(stage).get("gate")],
        remarks=list(_remarks(run)),
        curves=[(stage, panels) for stage in stages if stage.trained and (panels := stage_panels(stage.lines))][:MOST_CURVED],
        chances=[(name, models.chance_panel(found), models.chance_rows(found)) for name, found in evaluated.items()],
        lengths=[(name, models.length_panels(found)) for name, found in evaluated.items()],
        curated=[(stage, models.fates(_notes(stage))) for stage in stages if stage.kind == "curate" and stage.manifest],
        compared=[(name, answers.beside_each_other(found, run.faults)) for name, found in evaluated.items()],
        training=[] if evaluated else answers.in_training(run),
        versions=_versions(run),
        config=_yaml(content["document"]),
        again=f"r1 run {shlex.quote(str(content.get('config_file', 'CONFIG')))}",
        resume=f"r1 resume {run.name} --runs {shlex.quote(str(runs))}",
        mlflow=_mlflow(content.get("mlflow") or {}, runs),
    )


def _finalize(value: Any) -> Any:
    """Every text of the page goes through here before it is escaped."""
    return shown(value, MOST_TEXT) if type(value) is str else value


class _Drawer:
    """Turns panels into SVG, each with names of its own for what it refers to."""

    def __init__(self) -> None:
        self._drawn = 0

    def __call__(self, panel: Panel) -> Any:
        from markupsafe import Markup

        from stages.report.drawing import svg

        self._drawn += 1
        # What matplotlib writes is SVG in which every text is escaped.
        return Markup(svg(panel, f"p{self._drawn}"))  # noqa: S704


def _graph(stages: Sequence[Stage]) -> Any:
    try:
        return layout({stage.name: stage.needs for stage in stages})
    except CycleError:  # of a record that somebody edited
        return layout({stage.name: [] for stage in stages})


def _notes(stage: Stage) -> dict[str, Any]:
    notes = stage.manifest.get("notes")
    return notes if isinstance(notes, dict) else {}


def _remarks(run: Run) -> Iterator[tuple[str, str]]:
    every = [(stage.name, remark) for stage in run.stages for remark in stage.remarks]
    yield from ((name, shown(remark, MOST_REMARK)) for name, remark in every[:MOST_REMARKS])
    if len(every) > MOST_REMARKS:
        yield "and", f"{len(every) - MOST_REMARKS} more; `r1 status {run.name}` has them all"


def _versions(run: Run) -> list[tuple[str, str]]:
    """Name -> version, of the newest stage that is done; the commit first."""
    done = sorted((stage.manifest for stage in run.stages if stage.manifest), key=lambda found: str(found.get("finished")))
    if not done:
        return []
    commits = dict.fromkeys(str(found.get("git_commit")) for found in done)
    return [("commit", ", ".join(commits)), *((name, str(version)) for name, version in done[-1].get("versions", {}).items())]


def _yaml(document: dict[str, Any]) -> str:
    import yaml

    return shown(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110), MOST_CONFIG)


def _mlflow(link: dict[str, Any], runs: Path) -> tuple[str, str]:
    """(address, words): where the curves are in MLflow; no address unless it is one of the web."""
    uri = str(link.get("tracking_uri") or "")
    if uri.startswith(("http://", "https://")) and link.get("parent_run_id"):
        return f"{uri.rstrip('/')}/#/experiments/{link['experiment_id']}/runs/{link['parent_run_id']}", "the run in MLflow"
    return "", f"`r1 up --runs {shlex.quote(str(runs))}` shows the curves in MLflow" if uri else ""
