"""A review in a whole run: it stops after curation, says what to do, and goes on once that is done."""

import csv
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from stages.store.folders import Runs
from tests.commands import r1
from tests.conftest import ROOT

TINY = ROOT / "tests" / "pipeline" / "tiny.yaml"


@pytest.mark.parametrize(("folder", "option"), [("runs", ""), ("/elsewhere/runs", " --runs /elsewhere/runs")])
def test_the_line_names_the_run(folder: str, option: str) -> None:
    from flows.launch.attempt import Outcome
    from flows.pipeline.stage_task import _named
    from stages.contract.errors import RESUME, ExitStatus

    work: Any = SimpleNamespace(runs=Runs(Path(folder).absolute()), record=SimpleNamespace(name="r1-20260101-1"))
    outcome = Outcome(ExitStatus.MISTAKE, f"fill it in, then `{RESUME}`", "", Path())
    assert _named(outcome, work).message == f"fill it in, then `r1 resume r1-20260101-1{option}`"


@pytest.mark.slow
def test_a_review_stops_the_run_and_resume_goes_on_with_what_was_accepted(runs: Path) -> None:
    overrides = [
        f"runs={runs}",
        "name=reviewed",
        "stages.cold_start_data.sampler=base",
        "stages.cold_start_data.review=required",
        "stages.cold_start_data.filters={min_language: 0}",
        "stages.cold_start={epochs: 1, batch: 4}",
    ]
    arguments = ["run", TINY, "--until", "cold_start", *(x for o in overrides for x in ("--set", o))]
    stopped = r1(*arguments)
    assert stopped.returncode == 2, stopped.stderr[-3000:]
    assert "Traceback" not in stopped.stderr
    (line,) = (line for line in stopped.stderr.splitlines() if line.startswith("r1: "))
    found = re.fullmatch(
        r"r1: stage `cold_start_data`: (.*review\.csv): (\d+) of \2 answers wait for a verdict; "
        r"write `accept` or `reject` into the column `verdict` of every row of this file, "
        r"then go on with `r1 (resume reviewed-\d+-1 --runs .*)`",
        line,
    )
    assert found, line
    path = Path(found[1])
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == int(found[2]) >= 4
    for number, row in enumerate(rows):
        row["verdict"] = "reject" if number % 2 else "accept"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    chunks = {p: p.stat().st_mtime_ns for p in path.parents[1].glob("rollouts/*")}
    done = r1(*shlex.split(found[3]), "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(done.stdout)
    stages = {stage["stage"]: stage for stage in document["stages"]}
    assert stages["cold_start"]["status"] == stages["cold_start_data"]["status"] == "done"
    folder = Path(stages["cold_start_data"]["folder"])
    assert folder == path.parents[1]
    assert {p: p.stat().st_mtime_ns for p in folder.glob("rollouts/*")} == chunks, "sampled again"
    kept = pq.read_table(folder / "dataset" / "train.parquet").to_pylist()
    assert [row["problem_id"] for row in kept] == [row["problem_id"] for row in rows[::2]]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["notes"]["answers"]["rejected"] == len(rows) // 2
    assert sum(manifest["notes"]["answers"].values()) == 160
