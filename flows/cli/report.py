"""`r1 report`: the page that a run makes at its end, again."""

import argparse
from pathlib import Path

from flows.cli.run import Answer, runs_of
from flows.runs.page import needs
from flows.runs.record import RunRecord
from stages.contract.errors import ExitStatus, UserError


def report(options: argparse.Namespace) -> Answer:
    """`r1 report`: make a run's page from what is on disk now."""
    from stages.report.facts import read_run
    from stages.report.figure import write_own_figure
    from stages.report.page import write_page

    record = RunRecord.open(runs_of(options).pipeline(options.run))
    record.results()  # nothing is shown that is not what its manifest says
    content = {**record.content, "status": record.status()}
    path, faults = write_page(record.folder, content, needs(record))
    figure = Path(options.figure).absolute() if options.figure else None
    if figure and not write_own_figure(read_run(record.folder), figure):
        raise UserError("has no training stage with curves", where=record.name, mend="leave --figure out")
    if not options.json:
        print(path, *([figure] if figure else []), sep="\n")
        print("".join(f"r1: not shown: {fault}\n" for fault in faults), end="")
    return ExitStatus.DONE, {
        "run": record.name,
        "report": str(path),
        "bytes": path.stat().st_size,
        "not_shown": faults,
        "figure": str(figure) if figure else None,
    }
