"""The command `r1`. Thin: what a command needs is imported when it runs, so that `r1 --help` costs nothing."""

import argparse
import contextlib
import importlib
import os
import sys
import threading
import time
from typing import NoReturn

from stages.store.errors import ExitStatus, Interrupted, StageFailed, UserError

EXIT_SECONDS = 10.0
"""How long a command that has said everything may take to end."""
COMMANDS = {
    "run": "flows.commands:run",
    "resume": "flows.commands:resume",
    "stage": "flows.commands:stage",
    "status": "flows.commands:status",
    "compare": "flows.commands:compare",
    "study": "flows.study:study",
    "up": "flows.commands:up",
    "deploy": "flows.commands:deploy",
    "doctor": "flows.commands:doctor",
    "schema": "flows.commands:schema",
}
"""Command -> the function that does it: it takes the parsed options, gives exit status and JSON document, and writes text on
standard output only without `--json`."""


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
    place = _Parser(add_help=False)
    place.add_argument("--runs", metavar="FOLDER", default="runs", help="the runs folder (default: runs)")
    tries = _Parser(add_help=False)
    tries.add_argument("--retries", type=_natural, default=0, help="new attempts of a stage that failed (default: 0)")

    top = _Parser(prog="r1", description="The DeepSeek-R1 training recipe as one resumable graph.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str, *parents: _Parser) -> _Parser:
        return commands.add_parser(name, help=text, description=text, parents=[*parents, shared])

    run = command("run", "Run a recipe; finished stages are reused.", config, traced, tries)
    run.add_argument("--from", metavar="STAGE", dest="from_stage", help="what STAGE needs must be finished already")
    run.add_argument("--until", metavar="STAGE", dest="until_stage", help="run STAGE and what it needs, nothing after it")
    run.add_argument("--fresh", metavar="STAGE", action="append", default=[], help="compute STAGE again (repeatable)")
    resume = command("resume", "Go on with an interrupted or failed run.", place, tries)
    resume.add_argument("run", metavar="RUN", help="a run's name, or `latest`")
    stage = command("stage", "Run one stage alone; its inputs must be finished.", traced, tries)
    stage.add_argument("stage", metavar="STAGE")
    stage.add_argument("config", metavar="CONFIG")
    stage.add_argument("--set", metavar="KEY=VALUE", dest="overrides", action="append", default=[], help="override a key")
    stage.add_argument("--fresh", action="store_true", help="compute it again")
    status = command("status", "What runs there are, or how far one is.", place)
    status.add_argument("run", metavar="RUN", nargs="?", help="a run's name, or `latest`")
    compare = command("compare", "Runs beside each other: params that differ, headline metrics.", place)
    compare.add_argument("run", metavar="RUN", nargs="+", help="at least two runs")
    study = command("study", "Run a study: variants over seeds, a verdict for each claim.", tries)
    study.add_argument("config", metavar="STUDY", help="such as configs/studies/variants.yaml")
    study.add_argument("--set", metavar="KEY=VALUE", dest="overrides", action="append", default=[], help="override a key")
    study.add_argument("--seeds", metavar="N,N…", help="these seeds instead of the study's own")
    study.add_argument("--only", metavar="VARIANT", action="append", default=[], help="only this variant (repeatable)")
    up = command("up", "Prefect and MLflow servers on loopback, until Ctrl-C.", place)
    up.add_argument("--prefect-port", type=int, default=4200)
    up.add_argument("--mlflow-port", type=int, default=5000)
    deploy = command("deploy", "Register a schedule for a recipe with Prefect.", config)
    deploy.add_argument("--cron", help="when, for example '0 3 * * *' (default: that of infra/prefect.yaml)")
    deploy.add_argument("--timezone", help="of the cron text, for example Europe/Berlin")
    deploy.add_argument("--name", help="the deployment's name (default: the recipe's)")
    command("doctor", "What works on this machine.", place)
    command("schema", "JSON schema of recipes.")
    return top


def _profiled(text: str) -> str:
    if int(text) < 1:
        raise ValueError
    return f"shared.compute.profile={int(text)}"


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 the user's mistake, 3 failed, 75 interrupted."""
    from flows import commands
    from flows.results import error_document, print_json

    given = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in given
    status, document = ExitStatus.DONE, None
    try:
        options = parser().parse_args(given)
        commands.stop_on_sigterm()
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitStatus.DONE)
    if as_json and document is not None:
        print_json(document)
    if "prefect" in sys.modules:
        threading.Thread(target=_end, args=(status,), daemon=True, name="end").start()
    return int(status)


def _end(status: ExitStatus) -> None:
    """End this process if Prefect's client, which at its end tries to send what is left, meets a server that is away."""
    time.sleep(EXIT_SECONDS)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(int(status))


if __name__ == "__main__":
    sys.exit(main())
