"""The command `r1`. Thin: what a command needs is imported when it runs, so that `r1 --help` costs nothing."""

import argparse
import contextlib
import importlib
import os
import sys
import threading
import time
from typing import NoReturn

from flows.cli.examples import EXAMPLES
from flows.cli.parser import add_daily_commands
from stages.contract.errors import ExitStatus, Interrupted, StageFailed, UserError
from stages.runtime.proxies import check_proxies, keep_loopback_direct
from stages.runtime.python_switches import demand_docstrings, restart_without_switches
from stages.runtime.streams import lead_nowhere, redact_tracebacks, without_secrets
from stages.store.system_faults import system_fault

EXECUTED = (
    "Before anything is computed, data, tasks, settings and models of the recipe are looked at, and its reward functions are "
    "executed on a made-up answer (in a process without key variables); --no-code leaves that out."
)
"""In the help of commands that look at a recipe."""
EXIT_SECONDS = 10.0
"""How long a command that has said everything may take to end."""
COMMANDS = {
    "run": "flows.cli.run:run",
    "resume": "flows.cli.run:resume",
    "stage": "flows.cli.run:stage",
    "join": "flows.cli.join:join",
    "plan": "flows.cli.plan:plan",
    "status": "flows.cli.run:status",
    "compare": "flows.cli.compare:compare",
    "study": "flows.cli.study:study",
    "report": "flows.cli.report:report",
    "up": "flows.cli.up:up",
    "down": "flows.cli.up:down",
    "deploy": "flows.cli.run:deploy",
    "worker": "flows.cli.worker:work",
    "rollouts": "flows.cli.rollouts:rollouts",
    "sample": "flows.cli.sample:sample",
    "export": "flows.cli.export:export",
    "gc": "flows.cli.gc:gc",
    "pin": "flows.cli.pin:pin",
    "unpin": "flows.cli.pin:unpin",
    "doctor": "flows.cli.run:doctor",
    "completion": "flows.cli.completion:completion",
    "schema": "flows.cli.run:schema",
}
"""Command -> the function that does it: it takes the parsed options, gives exit status and JSON document, and writes text on
standard output only without `--json`."""
NETWORK = ("run", "resume", "stage", "study", "up", "deploy", "worker")
"""Commands that speak HTTP whatever they are given."""


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of printing the usage."""
        raise UserError(message, where="command line", mend=f"see `{self.prog} --help`")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    shared = _Parser(add_help=False)
    shared.add_argument("--json", action="store_true", help="one JSON document on standard output, all else on standard error")
    config = _Parser(add_help=False)
    config.add_argument("config", metavar="CONFIG", help="a recipe, such as configs/quickstart.yaml")
    config.add_argument("--set", metavar="KEY=VALUE", dest="overrides", action="append", default=[], help="override a key")
    traced = _Parser(add_help=False)
    traced.add_argument(
        "--profile",
        metavar="STEP",
        dest="overrides",
        action="append",
        type=_profiled,
        help="write a trace of this step of every training stage into its folder",
    )
    code = _Parser(add_help=False)
    code.add_argument("--no-code", action="store_true", help="do not execute the recipe's reward module to try it beforehand")
    place = _Parser(add_help=False)
    place.add_argument("--runs", metavar="FOLDER", default="runs", help="the runs folder (default: runs)")
    tries = _Parser(add_help=False)
    tries.add_argument("--retries", type=_natural, default=0, help="new attempts of a stage that failed (default: 0)")
    tries.add_argument(
        "--retry-delay",
        metavar="SECONDS",
        type=_seconds,
        default=10.0,
        help="before the first new attempt; each further pause is twice as long (default: 10)",
    )
    tries.add_argument(
        "--parallel", metavar="N", type=_positive, default=1, help="stages at a time, where none needs another (default: 1)"
    )

    top = _Parser(prog="r1", description="The DeepSeek-R1 training recipe as one resumable graph.")
    subcommands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str, *parents: _Parser) -> _Parser:
        example = f"example: {EXAMPLES[name]}" if name in EXAMPLES else None
        about = f"{text} {EXECUTED}" if code in parents else text
        return subcommands.add_parser(name, help=text, description=about, epilog=example, parents=[*parents, shared])

    run = command("run", "Run a recipe; finished stages are reused.", config, traced, code, tries)
    run.add_argument("--from", metavar="STAGE", dest="from_stage", help="what STAGE needs must be finished already")
    run.add_argument("--until", metavar="STAGE", dest="until_stage", help="run STAGE and what it needs, nothing after it")
    run.add_argument("--fresh", metavar="STAGE", action="append", default=[], help="compute STAGE again (repeatable)")
    resume = command("resume", "Go on with an interrupted or failed run.", place, code, tries)
    resume.add_argument("run", metavar="RUN", help="a run's name, or `latest`")
    how = "override a key that changes no result: `stages.GATE.otherwise=warn`, threads, time-outs"
    resume.add_argument("--set", metavar="KEY=VALUE", dest="overrides", action="append", default=[], help=how)
    stage = command("stage", "Run one stage alone; its inputs must be finished.", traced, code, tries)
    stage.add_argument("stage", metavar="STAGE")
    stage.add_argument("config", metavar="CONFIG")
    stage.add_argument("--set", metavar="KEY=VALUE", dest="overrides", action="append", default=[], help="override a key")
    stage.add_argument("--fresh", action="store_true", help="compute it again")
    join = command("join", "Take part, as a further machine, in a run or stage on several machines.", place)
    join.add_argument("stage", metavar="RUN|FOLDER", help="a run in a shared runs folder, or the folder of one stage")
    join.add_argument("--node-rank", metavar="N", type=_natural, required=True, help="number of this machine; 0 is the first's")
    join.add_argument("--rendezvous", metavar="HOST:PORT", help="of the first machine (default: the recipe's)")
    join.add_argument("--interface", metavar="NAME", help="network interface of this machine (default: the recipe's)")
    join.add_argument("--attempt", metavar="FOLDER", help="of the first machine: the attempt that a launcher began")
    plan = command("plan", "What would run, and what it takes: memory, tokens, hours, cost.", code)
    plan.add_argument("config", metavar="CONFIG", nargs="?", help="a recipe, such as configs/quickstart.yaml")
    plan.add_argument("--set", metavar="KEY=VALUE", dest="overrides", action="append", default=[], help="override a key")
    plan.add_argument("--gpu", metavar="NAME", help="h800, h100, a100, rtx4090 or cpu (default: cpu in float32, else h100)")
    plan.add_argument("--gpus", metavar="N[,N…]", type=_numbers, help="for every stage; several numbers: a table, on paper")
    plan.add_argument("--price", type=_amount, help="of a GPU hour")
    plan.add_argument("--length", metavar="TOKENS", type=_amount, help="mean length of an answer")
    plan.add_argument("--layout", choices=("zero", "resident"), default="zero", help="of weights in training, on paper")
    plan.add_argument("--speculation", type=_amount, default=1.0, help="tokens that a step of decoding gives (default: 1)")
    plan.add_argument("--model-config", metavar="STAGE=FILE", action="append", default=[], help="a model's config.json")
    plan.add_argument("--calibrate", metavar="RUNS", help="learn this machine's speed from the finished runs of a folder")
    plan.add_argument("--out", metavar="FOLDER", help="where --calibrate writes (default: RUNS)")
    status = command("status", "What runs there are, or how far one is.", place)
    status.add_argument("run", metavar="RUN", nargs="?", help="a run's name, or `latest`")
    compare = command("compare", "Runs beside each other: params that differ, headline metrics, learning curves.", place)
    compare.add_argument("run", metavar="RUN", nargs="+", help="at least two runs")
    compare.add_argument("--figure", metavar="FILE", help="where the curves go, as PNG (default: compare/ in the runs folder)")
    study = command("study", "Run a study: variants over seeds, a verdict for each claim.", code, tries)
    study.add_argument("config", metavar="STUDY", help="such as configs/studies/variants.yaml")
    study.add_argument("--set", metavar="KEY=VALUE", dest="overrides", action="append", default=[], help="override a key")
    study.add_argument("--seeds", metavar="N,N…", help="these seeds instead of the study's own")
    study.add_argument("--only", metavar="VARIANT", action="append", default=[], help="only this variant (repeatable)")
    report = command("report", "Make a run's page again, report.html in its folder.", place)
    report.add_argument("run", metavar="RUN", help="a run's name, or `latest`")
    report.add_argument(
        "--figure", metavar="FILE", help="also the learning curves of its training stages in one figure, as PNG"
    )
    _servers(command("up", "Prefect and MLflow servers on loopback, until Ctrl-C.", place))
    command("down", "Stop the servers of `r1 up`.", place)
    deploy = command("deploy", "Register a schedule for a recipe with Prefect.", code, tries)
    deploy.add_argument("config", metavar="CONFIG", nargs="?", help="a recipe, such as configs/quickstart.yaml")
    deploy.add_argument("--set", metavar="KEY=VALUE", dest="overrides", action="append", default=[], help="override a key")
    deploy.add_argument("--cron", help="when, for example '0 3 * * *' (default: that of infra/prefect.yaml)")
    deploy.add_argument("--interval", metavar="TIME", help="how often, for example 6h, 30m, 2d")
    deploy.add_argument("--timezone", help="of the schedule, for example Europe/Berlin")
    deploy.add_argument("--stage", metavar="STAGE", help="this stage alone; its inputs must be finished")
    deploy.add_argument("--name", help="the deployment's name (default: the recipe's)")
    deploy.add_argument("--pool", metavar="NAME", default="r1", help="the work pool, made when it isn't there (default: r1)")
    deploy.add_argument(
        "--pool-type", choices=["process", "docker", "kubernetes"], default="process", help="(default: process)"
    )
    deploy.add_argument(
        "--slots", metavar="NAME=N", action="append", default=[], help="make N slots for `compute.slots: NAME` (repeatable)"
    )
    deploy.add_argument("--automations", action="store_true", help="register those of infra/automations.yaml")
    worker = command("worker", "Run what is scheduled, on this machine, until Ctrl-C.", place)
    worker.add_argument("--pool", metavar="NAME", default="r1", help="its work pool (default: r1)")
    worker.add_argument("--limit", metavar="N", type=_positive, help="runs at a time (default: any number)")
    add_daily_commands(command, place, code)
    command("schema", "JSON schema of recipes.")
    return top


def _servers(up: _Parser) -> None:
    up.add_argument("--prefect-port", metavar="PORT", type=int, default=4200)
    up.add_argument("--mlflow-port", metavar="PORT", type=int, default=5000)
    up.add_argument("--detach", action="store_true", help="leave them running; `r1 down` stops them")
    up.add_argument("--postgres", metavar="URL", help="keep both databases there, for example postgresql://me@127.0.0.1/")
    up.add_argument("--prefect-database", metavar="NAME", default="r1_prefect", help="its name there (default: r1_prefect)")
    up.add_argument("--mlflow-database", metavar="NAME", default="r1_mlflow", help="its name there (default: r1_mlflow)")
    up.add_argument("--host", default="127.0.0.1", help="the address to listen on; others than loopback need credentials")
    up.add_argument("--allowed-hosts", metavar="NAMES", help="names, separated by commas, by which MLflow may be called")
    up.add_argument("--auth", action="store_true", help="ask for credentials on loopback too")


def _profiled(text: str) -> str:
    if int(text) < 1:
        raise ValueError
    return f"shared.compute.profile={int(text)}"


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def _expand_homes(options: argparse.Namespace) -> None:
    """Replace a leading `~` in every option: a shell leaves it in `--runs=~/x`. Raises UserError for an unknown home."""
    for name, value in vars(options).items():
        if isinstance(value, str) and value.startswith("~"):
            from stages.contract.config import expanded_path

            try:
                setattr(options, name, expanded_path(value))
            except ValueError as error:
                raise UserError(str(error), where=name.replace("_", " ")) from error


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 3600:
        raise ValueError
    return value


def _amount(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def _numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run one command, as `_main` does, and let no secret out."""
    if arguments is None:  # this process is the command
        restart_without_switches()
        redact_tracebacks()
    with without_secrets():
        return _main(arguments)


def _main(arguments: list[str] | None) -> int:
    """Run one command; returns the exit status: 0 done, 2 the user's mistake, 3 failed, 4 stopped by a gate, 75 interrupted."""
    from flows.cli import run
    from flows.output import print_json
    from flows.runs.results import error_document

    if "_ARGCOMPLETE" in os.environ:  # the shell asks what could come next
        from flows.cli.completion import complete

        complete(parser())
    given = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in given
    status, document = ExitStatus.DONE, None
    try:
        demand_docstrings()
        options = parser().parse_args(given)
        _expand_homes(options)
        if options.command in NETWORK:
            check_proxies()
        keep_loopback_direct()
        run.stop_on_signals()
        module, _, function = COMMANDS[options.command].partition(":")
        status, document = getattr(importlib.import_module(module), function)(options)
    except UserError as error:
        status = ExitStatus.MISTAKE
        document = error_document(status, error.what, error.where, error.mend)
        print(f"r1: {error}", file=sys.stderr)
    except StageFailed as error:
        status = ExitStatus.FAILED
        document = error_document(status, str(error))
        print(f"r1: {error}", file=sys.stderr)
    except (KeyboardInterrupt, Interrupted):
        status = ExitStatus.INTERRUPTED
        document = error_document(status, "interrupted")
        print("r1: interrupted", file=sys.stderr)
    except BrokenPipeError:
        # The reader (`head`, say) has seen enough; Python would complain once more when it closes the stream.
        lead_nowhere(sys.stdout)
        return int(ExitStatus.DONE)
    except OSError as error:
        if (fault := system_fault(error)) is None:
            raise
        status = ExitStatus.FAILED
        document = error_document(status, fault)
        print(f"r1: {fault}", file=sys.stderr)
    if as_json and document is not None:
        print_json(document)
    if arguments is None and "prefect" in sys.modules:  # this process is the command, and ends with it
        threading.Thread(target=_end, args=(status,), daemon=True, name="end").start()
    return int(status)


def _end(status: ExitStatus) -> None:
    """End this process if Prefect's client, which at its end tries to send what is left, meets a server that is away."""
    time.sleep(EXIT_SECONDS)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(int(status))
