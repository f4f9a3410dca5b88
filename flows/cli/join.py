"""`r1 join`: what one machine does for a stage on several. Its exit status says how its ranks ended, which torchrun's does not.

By hand on every machine but the first, where `r1 run` does it; under Slurm and Kubernetes on every machine. Of a run it follows
the record, in a runs folder that the machines share, and takes part in each of its stages.
"""

import argparse
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from flows.cli.run import Answer, runs_of
from flows.launch.attempt import launch
from flows.launch.slurm import STOP
from stages.contract.config import Compute
from stages.contract.errors import ExitStatus, Interrupted, StageFailed, UserError
from stages.store.files import read_json
from stages.store.folders import StageFolder
from stages.store.locks import hold

_POLL_SECONDS = 1.0


def join(options: argparse.Namespace) -> Answer:
    """Take part in a stage, or in every stage of a run that is on several machines."""
    signal.signal(signal.SIGTERM, _stop)
    # Slurm sends this one to all below us too, whom it would end: blocked here, it is blocked there.
    signal.pthread_sigmask(signal.SIG_BLOCK, {STOP})
    threading.Thread(target=_pass_on, daemon=True, name="stop").start()
    folder = Path(options.stage).absolute()
    if (folder / "config.json").is_file():
        join_stage(StageFolder(folder), options)
    elif "/" in options.stage and not (folder / "pipeline.json").is_file():
        mend = (
            "name the folder of a stage, or a run; a machine with a runs folder of its own needs a copy of the stage's folder"
        )
        raise UserError("no stage's folder, nor a run's", where=str(folder), mend=mend)
    else:
        follow(options)
    return ExitStatus.DONE, {"status": "done", "machine": options.node_rank}


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    """Stop, once: Slurm asks all of a cancelled job's processes, and `r1 run` among them asks us again."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _pass_on() -> None:
    signal.sigwait({STOP})
    os.kill(os.getpid(), signal.SIGTERM)


def join_stage(folder: StageFolder, options: argparse.Namespace) -> None:
    """Take part in one attempt of a stage.

    Raises UserError, StageFailed or Interrupted as the machine's ranks ended.
    """
    compute, node = _compute(folder, options), int(options.node_rank)
    if node >= compute.hosts:
        mend = f"the stage is on {compute.hosts}: 0 to {compute.hosts - 1}"
        raise UserError(f"there is no machine {node}", where="--node-rank", mend=mend)
    attempt = Path(options.attempt).absolute() if options.attempt and node == 0 else None
    if attempt is None and node == 0:  # nobody else holds it
        with hold(folder, _note):
            outcome = launch(folder, compute)
    else:
        outcome = launch(folder, compute, attempt=attempt, node=node)
    log = outcome.attempt / "log.txt"
    if outcome.status is ExitStatus.MISTAKE:
        raise UserError(outcome.message)
    if outcome.status is ExitStatus.FAILED:
        raise StageFailed(f"machine {node}: {outcome.message}; the log is {log}")
    if outcome.status is ExitStatus.INTERRUPTED:
        raise Interrupted
    _note(f"machine {node} has done its part of {folder.path.name}")


def _compute(folder: StageFolder, options: argparse.Namespace) -> Compute:
    """The stage's own settings, and what is this machine's."""
    given = {"rendezvous": options.rendezvous, "interface": options.interface}
    try:
        stored = read_json(folder.config)["config"]["compute"]
        return Compute.model_validate({**stored, "launcher": "local", **{k: v for k, v in given.items() if v is not None}})
    except (OSError, LookupError, TypeError, ValueError) as error:  # pydantic's is a ValueError
        reason = str(error).replace("\n", " ")
        raise UserError(f"not the config of a stage on several machines ({reason})", where=str(folder.config)) from error


def follow(options: argparse.Namespace) -> None:
    """Take part in each stage of a run that is on several machines, once an attempt, until the run has ended."""
    from flows.runs.record import RunRecord

    record = RunRecord.open(runs_of(options).pipeline(options.stage))
    if (place := Path(record.content["working_folder"])).is_dir():
        os.chdir(place)
    joined: dict[str, int] = {}
    while record.content["status"] == "running":
        for name, facts in record.stages.items():
            folder = record.place(name)
            if facts["status"] == "running" and (attempt := _newest(folder)) > joined.get(name, 0) and _hosts(folder) > 1:
                joined[name] = attempt
                _note(f"{name}: attempt {attempt}")
                _take_part(folder, options)
        time.sleep(_POLL_SECONDS)
        record.content = record.folder.read()
    _note(f"{record.name}: {record.content['status']}")


def _take_part(folder: StageFolder, options: argparse.Namespace) -> None:
    """One attempt's failure is for the run to judge, which may try again."""
    try:
        join_stage(folder, options)
    except (UserError, StageFailed) as error:
        _note(str(error))
    except Interrupted:
        _note("stopped on request")


def _newest(folder: StageFolder) -> int:
    return max((int(path.name) for path in folder.attempts.glob("*") if re.fullmatch("[0-9]+", path.name)), default=0)


def _hosts(folder: StageFolder) -> int:
    try:
        hosts: Any = read_json(folder.config)["config"]["compute"]["hosts"]
        return int(hosts)
    except (OSError, LookupError, TypeError, ValueError):
        return 1


def _note(text: str) -> None:
    print(f"r1: {text}", file=sys.stderr, flush=True)
