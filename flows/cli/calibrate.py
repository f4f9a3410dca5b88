"""`r1 plan --calibrate FOLDER`: this machine's seconds per unit from the stages that a runs folder has finished on it.

The measurements are written, not the fit: `r1 plan` makes it from them, and so can anyone. Each run is also predicted by a
fit of the others, which says how far a plan can be trusted.
"""

import argparse
import datetime as dt
from pathlib import Path
from typing import Any

from flows.doctor.checks import CALIBRATION
from flows.output import table
from flows.plan.measured import measured
from stages.contract.errors import ExitStatus, UserError
from stages.costs.fit import Measured, fitted, left_out
from stages.runtime.platform import processor_name, usable_cores
from stages.store.files import write_json
from stages.store.folders import StageFolder

FEWEST = 3
"""Runs of which a fit is made."""


def calibrate(options: argparse.Namespace) -> tuple[ExitStatus, dict[str, Any]]:
    """Read the runs, fit, write `calibration.json` into the folder `--out`, which is the runs folder by default.

    Raises UserError when there are too few runs.
    """
    folder = Path(options.calibrate)
    runs = read_runs(folder)
    if len(runs) < FEWEST:
        mend = "finish more first, for example `r1 run configs/plan/calibration.yaml`"
        raise UserError(f"{len(runs)} finished stages can be measured, {FEWEST} are wanted", where=str(folder), mend=mend)
    errors = left_out(runs)
    target = Path(options.out or options.calibrate) / CALIBRATION
    document = {
        "measured": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": "r1 plan --calibrate RUNS, after `python -m tests.bench.calibration RUNS` or any other runs",
        "machine": {"processor": processor_name(), "cores": usable_cores()},
        "rates": (rates := fitted(runs)),
        "runs": [run.model_dump() for run in runs],
    }
    write_json(target, document)
    if not options.json:
        print(told(errors, rates))
        print(f"\nwritten: {target}")
    return ExitStatus.DONE, {"file": str(target), "runs": errors, "rates": rates}


def read_runs(folder: Path) -> list[Measured]:
    """The measurements of every finished stage of a runs folder that tells something."""
    if not (folder / "stages").is_dir():
        raise UserError("not a runs folder: it has no `stages`", where=str(folder), mend="name the `runs:` of a recipe")
    found = [measured(StageFolder(path)) for path in sorted((folder / "stages").iterdir()) if path.is_dir()]
    return [run for run in found if run is not None]


def told(errors: list[dict[str, Any]], rates: dict[str, float]) -> str:
    """Each run as the others predict it, and the seconds per unit."""
    rows = [
        [
            e["run"],
            e["kind"],
            f"{e['measured']:.1f}",
            f"{e['predicted']:.1f}",
            f"{e['error']:+.0%}",
            f"{e['error_with_start']:+.0%}",
            ", ".join(e["untold"]),
        ]
        for e in errors
    ]
    head = ["run", "kind", "seconds", "by the others", "error", "with start and end", "told by no other run"]
    units = [[name, f"{1 / value:.3g}" if value else "-"] for name, value in rates.items()]
    return f"{table(head, rows, right=False)}\n\n{table(['amount', 'units a second'], units)}"
