"""What people look at, in a real browser: MLflow's pages of two finished runs, and the report, in which nothing runs."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flows.runs.record import RunRecord
from stages.rollout.records import read_groups, write_groups
from stages.store.folders import Runs
from stages.tracking.compare import compare
from tests.commands import r1
from tests.pipeline.browser import Browser
from tests.requirements import needs
from tests.servers.stoppable import TINY, Stoppable

pytestmark = [pytest.mark.slow, needs("chromium")]
PLANTED = "<script>document.title = 'taken'</script>"
SHOTS = os.environ.get("R1_SHOTS")
"""Where screenshots are kept, to be looked at."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs that differ in a learning rate; the second one's recipe has a name that is a script."""
    folder = tmp_path_factory.mktemp("look")
    recipe = folder / PLANTED  # a folder and a file in it, for there is a slash
    recipe.parent.mkdir()
    recipe.write_text(f"extends: {json.dumps(str(TINY))}\n")
    for config, lr in ((TINY, "1e-4"), (recipe, "3e-4")):
        values = (
            f"runs={folder / 'runs'}",
            "stages.zero.steps=12",
            "stages.evaluation.models=[base, zero]",
            f"stages.zero.lr={lr}",
        )
        options = [part for value in values for part in ("--set", value)]
        done = r1("run", config, "--until", "evaluation", *options, "--json", timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]
        document = json.loads(done.stdout)
        assert document["report"] == str(folder / "runs" / "pipelines" / document["run"] / "report.html")
    return folder / "runs"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def mlflow(runs: Path) -> Iterator[Stoppable]:
    server = Stoppable("mlflow", runs)
    try:
        server.start()
        yield server
    finally:
        server.end()


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    return Path(SHOTS) if SHOTS else tmp_path


def records(runs: Path) -> list[dict[str, Any]]:
    return [folder.read() for folder in Runs(runs).pipelines()]


def test_mlflow_compares_the_runs(runs: Path, mlflow: Stoppable, browser: Browser, shots: Path) -> None:
    address = compare(Runs(runs).pipelines(), server=mlflow.address)["address"]
    assert address is not None
    browser.open(address, height=1000)
    names = [folder.path.name for folder in Runs(runs).pipelines()]
    said = "document.body.innerText"
    browser.wait(f"{json.dumps(names)}.every(name => {said}.includes(name)) && {said}.includes('zero.lr')")
    # The parallel coordinates are drawn, one line for each run, over the param that differs and the results.
    browser.wait("document.querySelectorAll('.js-plotly-plot .parcoords').length > 0")
    # What it opens with is what differs, and the accuracy of the last model.
    chosen = "Parameters:\nzero.lr\nMetrics:\naccuracy\n"
    browser.wait(f"{said}.includes({json.dumps(chosen)})")
    browser.picture(shots / "mlflow-compare.png")
    assert browser.thrown == []


def test_mlflow_opens_the_view_of_all_runs(runs: Path, mlflow: Stoppable, browser: Browser, shots: Path) -> None:
    experiment = records(runs)[0]["mlflow"]["experiment_id"]
    browser.open(
        f"{mlflow.address}/#/experiments/{experiment}/runs?viewStateShareKey=r1&compareRunsMode=CHART", width=1900, height=1000
    )
    browser.wait("document.body.innerText.includes('Params and results')")
    browser.wait("document.querySelectorAll('.parcoords').length > 0")
    time.sleep(3)  # for the looks: it is drawn anew once its place is known
    browser.picture(shots / "mlflow-view.png")
    assert "Error loading shared view state" not in browser.ask("document.body.innerText")
    assert browser.thrown == []


def test_the_report_is_whole_and_nothing_in_it_runs(runs: Path, browser: Browser, shots: Path) -> None:
    record = RunRecord.open(Runs(runs).pipelines()[-1])
    plant(record)
    made = r1("report", record.name, "--runs", runs, "--json")
    assert made.returncode == 0, made.stderr
    report = json.loads(made.stdout)
    assert report["not_shown"] == []
    assert report["bytes"] < 3_000_000
    for name, facts in {"report": {}, "report-dark": {"dark": True}, "report-phone": {"width": 390, "height": 800}}.items():
        browser.open(Path(report["report"]).as_uri(), **facts)
        browser.picture(shots / f"{name}.png")
        assert browser.ask("document.title") == record.name
        assert (browser.thrown, browser.logged) == ([], [])
        assert browser.ask("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than its window"
    assert browser.ask("document.scripts.length + document.images.length") == 0
    sections = browser.ask(
        "[...document.querySelectorAll('section.curves')].map(s => [s.innerText, s.querySelectorAll('figure svg path').length])"
    )
    (zero,) = (section for section in sections if section[0].lower().startswith("zero"))
    assert "Accuracy and length" in zero[0] and "KL" not in zero[0]
    assert zero[1] > 20
    text = browser.ask("document.body.innerText")
    # Where a recipe, a stage and a model can put texts.
    assert text.count(PLANTED) >= 3
    for where in ("header", "main > ul", ".answers"):
        assert browser.ask(
            f"[...document.querySelectorAll({where!r})].some(e => e.innerText.includes({json.dumps(PLANTED)}))"
        ), where


def plant(record: RunRecord) -> None:
    """Have a model and a stage say it too."""
    record.stage("zero", remarks=[f"a remark {PLANTED}"])
    for file in record.place("evaluation.zero").rollouts.glob("*.parquet"):
        groups = read_groups(file)
        for group in groups:
            group.episodes = [replace(episode, text=f"{PLANTED}{episode.text}") for episode in group.episodes]
        write_groups(file, groups)


def test_the_runs_are_in_one_figure(runs: Path, shots: Path) -> None:
    names = [folder.path.name for folder in Runs(runs).pipelines()]
    done = r1("compare", *names, "--runs", runs, "--json", "--figure", shots / "compare.png")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["params"] == {"zero.lr": dict(zip(names, (1e-4, 3e-4), strict=True))}
    with Image.open(document["figure"]) as image:
        assert image.size[0] > 1000
    base, zero = (document["differences"][model]["accuracy"][names[1]] for model in ("base", "zero"))
    assert base == {"difference": 0.0, "stderr": 0.0, "problems": 12, "beyond_error": False}
    assert zero["problems"] == 12 and zero["stderr"] >= 0
    assert "difference to" in r1("compare", *names, "--runs", runs).stdout
