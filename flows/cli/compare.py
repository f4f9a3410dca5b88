"""`r1 compare`: what differs between runs, how their models did and whether that is more than chance, their curves."""

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

from flows.cli.run import Answer, runs_of
from flows.output import single_line
from stages.contract.errors import ExitStatus, UserError

LONGEST_NAME = 120
"""Characters of the figure's name that come from the runs' names."""
SHARES = ("accuracy", "accuracy_lenient", "cons_at_k", "format", "truncated")
"""Numbers whose differences are said in points."""


def compare(options: argparse.Namespace) -> Answer:
    """`r1 compare`."""
    from flows.runs.record import RunRecord
    from flows.servers.prefect_env import running_servers
    from stages.report.differences import differences
    from stages.report.facts import read_run
    from stages.report.figure import write_figure
    from stages.tracking.compare import compare as compared

    if len(options.run) < 2:
        raise UserError("one run cannot be compared", where="compare", mend="name at least two")
    runs = runs_of(options)
    servers = running_servers(runs.path)
    records = [RunRecord.open(runs.pipeline(name)) for name in options.run]
    for record in records:
        record.results()  # nothing is compared that is not what its manifest says
    folders = [record.folder for record in records]
    document: dict[str, Any] = compared(folders, server=servers["mlflow"]["address"] if servers else None)
    document["remarks"] = {record.name: record.remarks() for record in records}
    read = [read_run(folder) for folder in folders]
    document["differences"] = differences(read)
    figure = Path(options.figure) if options.figure else runs.path / "compare" / _file_name(document["runs"])
    document["figure"] = str(figure.absolute()) if write_figure(read, figure) else None
    if not options.json:
        _show(document, options.runs)
    return ExitStatus.DONE, document


def _file_name(names: list[str]) -> str:
    joined = re.sub(r"[^\w.-]", "_", "+".join(names).replace("+", "_vs_"))
    return f"{joined[:LONGEST_NAME]}.png"


def _show(document: dict[str, Any], runs: str) -> None:
    from flows.output import table

    names = document["runs"]
    print(table(["param", *names], [[k, *(str(v[n]) for n in names)] for k, v in document["params"].items()]))
    figures = [
        [f"{model} {metric}", *(_figure(values.get(n)) for n in names)]
        for model, metrics in document["metrics"].items()
        for metric, values in metrics.items()
    ]
    print(f"\n{table(['result', *names], figures)}")
    if document["differences"]:
        _show_differences(document["differences"], names)
    for name, remarks in document["remarks"].items():
        print("".join(f"\n{name}: {single_line(remark)}" for remark in remarks), end="\n" if remarks else "")
    print(f"\nfigure: {document['figure'] or 'none: the runs share no training stage'}")
    print(f"MLflow: {document['address'] or f'none: start `r1 up --runs {shlex.quote(str(runs))}`'}")


def _show_differences(differences: dict[str, Any], names: list[str]) -> None:
    from flows.output import table

    rows = [
        [f"{model} {metric}", *(_difference(metric, values.get(name)) for name in names[1:])]
        for model, metrics in differences.items()
        for metric, values in metrics.items()
    ]
    print(f"\n{table([f'difference to {names[0]}', *names[1:]], rows)}")
    print("± standard error over the same problems; * beyond two of them: not chance, but for one time in twenty")


def _difference(metric: str, found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    scale = 100 if metric in SHARES else 1
    error = f" ± {scale * found['stderr']:.1f}" if found["stderr"] is not None else ""
    return f"{scale * found['difference']:+.1f}{error}{' *' if found['beyond_error'] else '  '}"


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"
