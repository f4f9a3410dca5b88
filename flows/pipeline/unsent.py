"""Runs that reused every stage while no server was there: sent to MLflow and Prefect by the next command that has both."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from flows.servers import exit_with_parent
from stages.contract.errors import UserError
from stages.store.folders import PipelineFolder, Runs, StageFolder
from stages.store.manifest import Manifest, verify_manifest
from stages.store.user_code import child_environment

UNSENT = "unsent"
"""Key of such a run's record."""


def unsent(runs: Runs) -> list[PipelineFolder]:
    """The folder's runs that no server has, the oldest first."""
    facts = ((folder, folder.read()) for folder in runs.pipelines())
    return [folder for folder, record in facts if record.get(UNSENT) and record.get("status") == "done"]


def send_in_background(runs: Runs) -> subprocess.Popen[bytes] | None:
    """Send them from a process of its own, which ends when this one does; None when there are none."""
    if not unsent(runs):
        return None
    command = [
        sys.executable,
        str(Path(exit_with_parent.__file__).resolve()),
        str(os.getpid()),
        "flows.pipeline.unsent",
        str(runs.path),
    ]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=child_environment(), start_new_session=True)


def send(runs: Runs, note: Callable[[str], None]) -> None:
    """Send them, one process at a time. What a server does not take now is tried again by the next command."""
    if not (waiting := unsent(runs)):
        return
    import httpx

    try:
        with FileLock(runs.path / ".unsent.lock").acquire(timeout=0):
            for folder in waiting:
                try:
                    _send(folder, note)
                except (UserError, httpx.HTTPError) as error:
                    note(f"{folder.path.name} is not in MLflow and Prefect yet ({error})")
    except Timeout:  # another command sends them
        return


def _send(folder: PipelineFolder, note: Callable[[str], None]) -> None:
    from prefect.client.schemas.objects import State
    from prefect.states import Completed

    from flows.pipeline.artifacts import Artifacts
    from flows.pipeline.flow import Manner, pipeline
    from flows.pipeline.progress import Lines
    from flows.pipeline.run_tracking import begin_tracking, end_tracking
    from flows.runs.record import FINISHED, RunRecord
    from flows.servers.prefect_client import impatient_client

    record = RunRecord.open(folder)
    if not record.content[UNSENT]:  # another command has sent it meanwhile
        return
    tracking = begin_tracking(record, note, None)
    for name, facts in record.stages.items():
        place = record.place(name)
        if facts["status"] in FINISHED and (manifest := _manifest(place, facts["fingerprint"])) is not None:
            stage = tracking.stage(name, place, facts["mlflow_run_id"], reused_from=place.path.name)
            stage.finish("FINISHED", manifest)
    page = folder.path / "report.html"
    end_tracking(tracking, record, "done", page if page.is_file() else None)
    if not tracking.parent_run_id:
        return
    with impatient_client() as client:
        state: State[None] = Completed(message="every stage was reused")
        parameters = {"run": str(folder.path), **asdict(Manner())}
        flow_run = client.create_flow_run(pipeline, name=record.name, parameters=parameters, state=state)
    record.update(**{UNSENT: False})
    shown = Artifacts(Lines(lambda _: None), record, str(flow_run.id))
    shown.curves()
    shown.results()
    shown.close()


def _manifest(folder: StageFolder, fingerprint: str | None) -> Manifest | None:
    """None when the stage has been removed or damaged since: it is left out."""
    try:
        return verify_manifest(folder, fingerprint)
    except UserError:
        return None


def main() -> int:
    """`python -m flows.pipeline.unsent RUNS`: send what waits to the servers of `r1 up` or the environment's."""
    from flows.servers.prefect_env import point_at_server
    from stages.runtime.proxies import keep_loopback_direct
    from stages.runtime.streams import redact_streams

    redact_streams()
    keep_loopback_direct()
    runs = Runs(Path(sys.argv[1]))
    point_at_server(runs.path)
    send(runs, lambda text: print(text, file=sys.stderr, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
