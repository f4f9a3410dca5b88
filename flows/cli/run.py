"""What each command of `r1` does: it gives its exit status and JSON document, and writes text only without `--json`."""

import argparse
import contextlib
import importlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from stages.contract.errors import ExitStatus, UserError

Answer = tuple[ExitStatus, dict[str, Any] | None]


def stop_on_signals() -> None:
    """Treat SIGTERM and a closed terminal (SIGHUP) like Ctrl-C, also before and after Prefect listens to them.

    A SIGHUP that is ignored (`nohup`) stays so. With its terminal closed this process goes on to its end without it: what
    would be written there is lost, and no error.
    """
    terminals = [number for number in (0, 1, 2) if os.isatty(number)]

    def stop(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP and terminals:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for terminal in terminals:
                os.dup2(nowhere, terminal)
        raise KeyboardInterrupt

    with contextlib.suppress(ValueError):  # only the main thread may
        signal.signal(signal.SIGTERM, stop)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, stop)


def run(options: argparse.Namespace) -> Answer:
    """`r1 run`."""
    return start(options, options.from_stage, options.until_stage, options.fresh)


def stage(options: argparse.Namespace) -> Answer:
    """`r1 stage`: one stage between `--from` and `--until` itself."""
    return start(options, options.stage, options.stage, [options.stage] if options.fresh else [])


def start(options: argparse.Namespace, from_stage: str | None, until_stage: str | None, fresh: list[str]) -> Answer:
    """Begin a run of the recipe `options.config`, and see it through."""
    from flows.doctor.checks import demand
    from flows.pipeline.all_reused import all_finished, record_reused
    from flows.runs.record import RunRecord
    from flows.runs.selection import select
    from flows.servers.prefect_env import servers_named
    from stages.recipe.resolve import load_recipe
    from stages.store.folders import Runs

    recipe = load_recipe(options.config, options.overrides)
    selection = select(recipe, from_stage, until_stage, fresh)
    demand(recipe, selection, options)
    Runs(recipe.runs).prepare()
    finished = None if servers_named(recipe.tracking.uri, recipe.runs) else all_finished(recipe, selection)
    record = RunRecord.create(recipe, options.config, from_stage, until_stage, fresh)
    print(f"run {record.name}", file=sys.stderr)
    if finished is None:
        return _go(record, options, recipe, selection)
    record_reused(record, recipe, finished, lambda line: print(line, file=sys.stderr, flush=True))
    return _conclude(record, options, ExitStatus.DONE)


def resume(options: argparse.Namespace) -> Answer:
    """`r1 resume`: the same document, the same folders, the same MLflow runs."""
    from flows.pipeline.unsent import UNSENT
    from flows.runs.record import RunRecord

    record = RunRecord.open(runs_of(options).pipeline(options.run))
    if record.status() == "running":
        raise UserError("the run is still running", where=record.name, mend=f"see `r1 status {record.name}`")
    if (lost := record.lost()) is not None:
        raise lost
    if not Path(record.content["working_folder"]).is_dir():
        raise UserError("the run's working folder is gone", where=record.content["working_folder"], mend="start a new run")
    os.chdir(record.content["working_folder"])
    if options.overrides:
        from flows.cli.resume import amend

        amend(record, options.overrides)
    recipe, selection = _demand_rest(record, options)
    record.content.pop(UNSENT, None)  # it is sent now
    record.begin()
    print(f"run {record.name}", file=sys.stderr)
    return _go(record, options, recipe, selection)


def _demand_rest(record: Any, options: argparse.Namespace) -> tuple[Any, Any]:
    """Look at what a run that is resumed has still to do; returns its recipe and selection."""
    from dataclasses import replace

    from flows.doctor.checks import demand
    from flows.runs.record import FINISHED
    from flows.runs.selection import select
    from stages.recipe.resolve import resolve

    content = record.content
    document = {**content["document"], "runs": str(record.folder.path.parents[1])}
    recipe = replace(resolve(document), code_folders=record.code_folders)
    fresh = [name for name in content["fresh"] if record.stages.get(name, {}).get("status") not in FINISHED]
    selection = select(recipe, content["from"], content["until"], fresh)
    demand(recipe, selection, options)
    return recipe, selection


def _go(record: Any, options: argparse.Namespace, recipe: Any, selection: Any) -> Answer:
    from flows.pipeline.stage_forks import early_forks
    from flows.servers.prefect_env import prefect_server

    runs, log = record.folder.path.parents[1], record.folder.path / "fork-server.log"
    with prefect_server(runs) as wait, early_forks(recipe, selection, log):
        from flows.pipeline.flow import Manner, run_pipeline
        from flows.pipeline.progress import PLAIN

        PLAIN.set(options.json)
        importlib.import_module("stages.tracking.mlflow.pipeline_run")  # takes seconds, in which the server starts
        wait()
        status = run_pipeline(record, Manner(options.retries, options.retry_delay, options.parallel))
        if status is ExitStatus.DONE:
            from flows.pipeline.unsent import send
            from stages.store.folders import Runs

            send(Runs(runs), lambda line: print(line, file=sys.stderr, flush=True))
    return _conclude(record, options, status)


def _conclude(record: Any, options: argparse.Namespace, status: ExitStatus) -> Answer:
    """Say how the run ended, and what came of it."""
    from flows.pipeline.conclusion import learned, next_commands
    from flows.runs.results import results_table, run_document, where_to_look
    from stages.runtime.streams import lead_nowhere

    if record.content["error"]:
        print(f"r1: {record.content['error']}", file=sys.stderr)
    if status is ExitStatus.INTERRUPTED or status is ExitStatus.FAILED:
        print(f"r1: go on with `r1 resume {record.name}`", file=sys.stderr)
    if not options.json:
        try:
            done = status is ExitStatus.DONE
            if done:
                print(learned(record))
            if models := record.results():
                print(results_table(models))
            print(where_to_look(record))
            if done:
                print("next:", *next_commands(record), sep="\n")
            sys.stdout.flush()
        except BrokenPipeError:  # nobody reads it; how the run ended is still said by the exit status
            lead_nowhere(sys.stdout)
    return status, run_document(record)


def status(options: argparse.Namespace) -> Answer:
    """`r1 status`."""
    from flows.output import table
    from flows.runs.record import RunRecord
    from flows.runs.results import error_document, results_table, run_document, stages_table, where_to_look

    runs = runs_of(options)
    if options.run:
        record = RunRecord.open(runs.pipeline(options.run))
        document = run_document(record)
        if not options.json:
            print(f"{record.name}: {record.status()}" + (f" ({record.content['error']})" if record.content["error"] else ""))
            print(stages_table(record))
            if document["models"]:
                print(results_table(document["models"]))
            print(where_to_look(record))
        if (lost := record.lost()) is None:
            return ExitStatus.DONE, document
        print(f"r1: {lost}", file=sys.stderr)
        return ExitStatus.MISTAKE, document | error_document(ExitStatus.MISTAKE, lost.what, lost.where, lost.mend)
    records, damaged = [], runs.damaged()
    for folder in runs.pipelines():
        try:
            records.append(RunRecord.open(folder))
        except UserError as error:
            damaged.append(error)
    rows = [
        {
            "run": record.name,
            "status": record.status(),
            "started": record.content["started"],
            "stages": len(record.stages),
            "finished": sum(item["status"] in ("done", "reused") for item in record.stages.values()),
        }
        for record in reversed(records)
    ]
    if not options.json:
        cells = [[r["run"], r["status"], r["started"], f"{r['finished']}/{r['stages']}"] for r in rows]
        print(table(["run", "status", "started", "stages"], cells, right=False) if cells else f"no runs in {runs.path}")
    told = [str(fault) for fault in damaged]
    print("".join(f"r1: {line}\n" for line in told), end="", file=sys.stderr)
    return ExitStatus.MISTAKE if told else ExitStatus.DONE, {"runs": rows, "damaged": told}


def deploy(options: argparse.Namespace) -> Answer:
    """`r1 deploy`."""
    from flows.deployments.register import register

    return ExitStatus.DONE, register(options)


def doctor(options: argparse.Namespace) -> Answer:
    """`r1 doctor`."""
    from flows.doctor.environment import examine
    from flows.doctor.finding import show
    from flows.doctor.host import examine_host
    from flows.doctor.recipe import examine_recipe

    runs = runs_of(options)
    findings = [*examine(runs), *examine_host(runs)]
    if options.config is not None:
        findings += examine_recipe(options.config, options.overrides, network=options.network, execute=not options.no_code)
    if not options.json:
        show(findings)
    failed = any(finding.state == "fail" for finding in findings)
    return ExitStatus.FAILED if failed else ExitStatus.DONE, {"checks": [vars(finding) for finding in findings]}


def schema(options: argparse.Namespace) -> Answer:
    """`r1 schema`: the document is the answer, with or without `--json`."""
    from flows.output import print_json
    from stages.recipe.resolve import recipe_schema

    document = recipe_schema()
    if not options.json:
        print_json(document)
    return ExitStatus.DONE, document


def runs_of(options: argparse.Namespace) -> Any:
    """The runs folder that `--runs` names."""
    from stages.store.folders import Runs

    return Runs(Path(options.runs).absolute())
