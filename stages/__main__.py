"""A stage's process: `python -m stages FOLDER` does what FOLDER/config.json says, alone or as a rank under torchrun, of which
every machine may have one.

It needs nothing of Prefect or MLflow. How it ended goes into `attempts/<n>/outcome.json`, because torchrun swallows exit
statuses; the manifest, written last, is the only proof of success.
"""

import argparse
import contextlib
import os
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from stages.contract.config import Compute
from stages.contract.errors import ExitStatus, Interrupted, UserError
from stages.contract.secrets import redact, redacted
from stages.kinds.registry import stage_kind
from stages.runtime import heartbeat
from stages.runtime.platform import peak_memory
from stages.runtime.proxies import keep_loopback_direct
from stages.runtime.python_switches import demand_docstrings, restart_without_switches
from stages.runtime.streams import redact_streams
from stages.store.files import TEMPORARY, read_json, write_json
from stages.store.folders import StageFolder
from stages.store.manifest import StageRecord, write_manifest
from stages.store.stage import Result, StageContext, StopRequest
from stages.store.system_faults import system_fault
from stages.store.user_code import inherited_code_folders, use_code_folders
from stages.store.user_files import check_user_files

if TYPE_CHECKING:
    from stages.engine.multi_node import Hosts

PARENT_VARIABLE = "R1_PARENT_PID"
"""Process id whose death ends this process: nothing is left running when the pipeline is killed."""


def main(arguments: list[str] | None = None) -> int:
    """Run one attempt of one stage; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m stages", description="Run one stage from its folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--attempt", type=Path, help="folder of this attempt; by default the next number")
    options = parser.parse_args(arguments)
    restart_without_switches()
    _end_with_parent()
    keep_loopback_direct()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    folder = StageFolder(options.folder.absolute())
    if not folder.config.is_file():
        print(f"{folder.config}: no such file; name the folder of a stage that `r1 run` has prepared", file=sys.stderr)
        return int(ExitStatus.MISTAKE)
    attempt = options.attempt or (folder.new_attempt() if rank == 0 else _beside_first(folder))
    heartbeat.start(attempt, rank)
    status, outcome = ExitStatus.DONE, {"status": "done", "message": "", "mend": ""}
    hosts = None
    redact_streams()
    try:
        demand_docstrings()
        hosts = _meet(folder, attempt, rank)
        run_stage(folder, rank, world_size, hosts)
    except UserError as error:
        status = ExitStatus.MISTAKE
        outcome = {"status": "mistake", "message": str(error), "mend": error.mend}
    except Interrupted:
        status = ExitStatus.INTERRUPTED
        outcome = {"status": "interrupted", "message": "stopped on request", "mend": "r1 resume"}
    except Exception as error:  # noqa: BLE001 - the boundary of the process: the outcome names what the log explains
        traceback.print_exc()
        status = ExitStatus.FAILED
        message = system_fault(error) or f"{type(error).__name__}: {error}"
        outcome = {"status": "failed", "message": redact(message), "mend": "see the log"}
    if status is not ExitStatus.DONE:
        print(f"rank {rank}: {outcome['status']}: {outcome['message']}", file=sys.stderr, flush=True)
    if rank == 0 or (hosts and hosts.first) or status not in (ExitStatus.DONE, ExitStatus.INTERRUPTED):
        _leave_outcome(attempt, rank, outcome, status)
    if hosts:
        hosts.leave(outcome)
    sys.stdout.flush()
    sys.stderr.flush()
    # Skips the interpreter's teardown: gloo's and DeepSpeed's threads may hang there after a rank has died.
    os._exit(int(status))


def _leave_outcome(attempt: Path, rank: int, outcome: dict[str, str], status: ExitStatus) -> None:
    name = "outcome.json" if rank == 0 else f"outcome-rank{rank}.json"
    write_json(attempt / name, outcome | {"exit_status": int(status)})


def _beside_first(folder: StageFolder) -> Path:
    """Where a rank that is not the first leaves its signs when nobody has named an attempt: each machine has a place."""
    place = folder.host(machine) if (machine := int(os.environ.get("GROUP_RANK", "0"))) else folder.attempts
    place.mkdir(parents=True, exist_ok=True)
    return place


def _meet(folder: StageFolder, attempt: Path, rank: int) -> "Hosts | None":
    """Meet the other machines, whose failure ends this process from now on; None on one machine."""
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1:
        return None
    from stages.engine.multi_node import Hosts

    def end(word: dict[str, Any]) -> None:
        status = ExitStatus.MISTAKE if word["status"] == "mistake" else ExitStatus.FAILED
        print(f"rank {word['rank']}: {word['status']}: {word['message']}", file=sys.stderr, flush=True)
        _leave_outcome(attempt, word["rank"], {key: word[key] for key in ("status", "message", "mend")}, status)
        os._exit(int(status))

    frozen_s = Compute().frozen_s
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # whose config is damaged says so later
        frozen_s = float(read_json(folder.config)["config"]["compute"]["frozen_s"])
    hosts = Hosts(attempt, rank, frozen_s)
    hosts.watch(end)
    return hosts


def run_stage(folder: StageFolder, rank: int = 0, world_size: int = 1, hosts: "Hosts | None" = None) -> Result:
    """Do what the folder's config says and, on rank 0, write the manifest.

    Raises UserError, Interrupted, or whatever the stage raises.
    """
    started = time.monotonic()
    try:
        record = StageRecord.model_validate(read_json(folder.config))
    except (OSError, ValueError, ValidationError) as error:
        raise UserError("cannot be read as a stage's config", where=str(folder.config)) from error
    kind = stage_kind(record.kind, str(folder.config))
    if record.version != kind.version:
        what = f"prepared for version {record.version} of `{kind.name}`, this is version {kind.version}"
        raise UserError(what, where=str(folder.config), mend="start it again with `r1 run`")
    try:
        config = kind.config.model_validate(record.config)
    except ValidationError as error:
        first = str(error.errors()[0]["msg"])
        raise UserError(f"not a config of `{kind.name}` ({first})", where=str(folder.config), mend="use `r1 run`") from error
    if getattr(getattr(config, "compute", None), "device", None) == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed moves all models to a GPU where it sees one
    folders = record.code_folders or list(inherited_code_folders())
    use_code_folders(folders)
    check_user_files(config, record.inputs, folders)
    if world_size > 1 and not kind.distributed:
        raise UserError(f"`{kind.name}` runs in one process", where="compute.processes", mend="set it to 1")
    if rank == 0:
        _sweep(folder)
    if hosts:
        hosts.agree(folder.path, record.fingerprint, record.inputs)
    stop = StopRequest()
    with contextlib.suppress(ValueError):  # signals can be listened to in the main thread only (tests use others)
        stop.listen()
    context = StageContext(
        config=config,
        folder=folder,
        inputs={role: Path(item.path) for role, item in record.inputs.items()},
        input_digests={role: item.digest for role, item in record.inputs.items()},
        stop=stop,
        rank=rank,
        world_size=world_size,
    )
    result = kind.run(context)
    peaks = [(peak_memory(), peak_gpu_memory())]
    if world_size > 1:
        from stages.engine import distributed

        peaks = distributed.gather(peaks[0])
    memory, gpu_memory = (None if None in column else sum(filter(None, column)) for column in zip(*peaks, strict=True))
    if rank == 0:
        seconds = time.monotonic() - started + _earlier_seconds(folder)
        write_manifest(
            folder,
            record,
            kind.output,
            metrics=result.metrics,
            notes=redacted(result.notes),
            remarks=redacted(result.remarks),
            tokens=result.tokens,
            wall_seconds=round(seconds, 3),
            device_seconds=round(seconds * world_size, 3),
            peak_memory=memory,
            peak_gpu_memory=gpu_memory,
        )
    return result


def peak_gpu_memory() -> int | None:
    """Most bytes of tensors that this process has held on its GPU at a time, None where it used none."""
    torch = sys.modules.get("torch")
    return int(torch.cuda.max_memory_allocated()) if torch is not None and torch.cuda.is_initialized() else None


def _sweep(folder: StageFolder) -> None:
    """Remove what a killed attempt had not finished writing. The pipeline holds the folder's lock."""
    for place in (folder.path, folder.checkpoints, folder.rollouts, folder.path / "best"):
        for left in place.glob(f"{TEMPORARY}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _earlier_seconds(folder: StageFolder) -> float:
    """Wall time of attempts that did not finish, as their parents recorded it."""
    found = (read_json(path)["seconds"] for path in folder.attempts.glob("*/ended.json"))
    return float(sum(found))


def _end_with_parent() -> None:
    text = os.environ.get(PARENT_VARIABLE)
    if not text:
        return
    parent = int(text)

    def watch() -> None:
        while True:
            try:
                os.kill(parent, 0)
            except ProcessLookupError:
                print(f"process {parent}, which started this stage, is gone: ending", file=sys.stderr, flush=True)
                os._exit(int(ExitStatus.INTERRUPTED))
            time.sleep(1.0)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


if __name__ == "__main__":
    sys.exit(main())
