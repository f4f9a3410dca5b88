"""The pipeline as one operates it: servers on PostgreSQL, a schedule, a worker, cancelling, slots, a process that is gone."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
import pytest
import yaml
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterName,
)
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.schemas.automations import AutomationCore
from prefect.states import Cancelling

from flows.pipeline import slots
from flows.runs.markdown import escaped
from stages.contract.errors import UserError
from stages.tracking.journal import read
from tests.conftest import ROOT
from tests.deployments.operation import Operation, digests, wait_for
from tests.servers.stoppable import check_mlflow

TINY = ROOT / "tests" / "pipeline" / "tiny.yaml"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def operation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operation]:
    operation = Operation(tmp_path_factory.mktemp("operation"))
    try:
        operation.worker("worker")
        yield operation
    finally:
        operation.end()


def flow_run(operation: Operation, name: str) -> Any:
    """The newest flow run of that name; runs folders name theirs apart from each other."""
    with operation.client() as client:
        wanted = FlowRunFilter(name=FlowRunFilterName(any_=[name]))
        return client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.START_TIME_DESC)[0]


def state(operation: Operation, name: str) -> str:
    return str(flow_run(operation, name).state.type.value)


def artifacts(operation: Operation, run_id: UUID) -> dict[str, Any]:
    """Key -> the artifacts of a flow run."""
    with operation.client() as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id])))
    return {artifact.key: artifact for artifact in found}


def begun(operation: Operation, deployment: str) -> int:
    """How many runs of a deployment a worker has taken."""
    with operation.client() as client:
        wanted = FlowRunFilterDeploymentId(any_=[client.read_deployment_by_name(deployment).id])
        found = client.read_flow_runs(flow_run_filter=FlowRunFilter(deployment_id=wanted))
    return sum(run.state.type.value not in ("SCHEDULED", "CANCELLED") for run in found)


def run_now(operation: Operation, deployment: str, **parameters: Any) -> None:
    with operation.client() as client:
        client.create_flow_run_from_deployment(client.read_deployment_by_name(deployment).id, parameters=parameters)


def journal(runs: Path, kind: str = "rl") -> list[Any]:
    """The journal of the newest stage of that kind, empty as long as there is none."""
    found = sorted(runs.glob(f"stages/{kind}-*/journal.jsonl"), key=lambda file: file.stat().st_mtime)
    return read(found[-1]) if found else []


def test_a_schedule_fires_and_the_run_completes(operation: Operation) -> None:
    facts = operation.r1("deploy", TINY, "--interval", "60s", "--name", "nightly", *operation.sets())
    assert (facts["deployment"], facts["interval"]) == ("r1-config/nightly", 60)
    wait_for("scheduled run", lambda: begun(operation, "r1-config/nightly"), 180, operation.folder / "worker.log")
    with operation.client() as client:  # once is enough
        client.pause_deployment(client.read_deployment_by_name("r1-config/nightly").id)
    first = wait_for("record", lambda: operation.records(), 180, operation.folder / "worker.log")[0]["run"]
    wait_for("end of the run", lambda: operation.records()[0]["status"] != "running", 400, operation.folder / "worker.log")
    record = operation.records()[0]
    assert (record["run"], record["status"], record["error"]) == (first, "done", None)
    wait_for("state", lambda: state(operation, first) == "COMPLETED", 30)
    check_mlflow(operation.mlflow, record)
    found = artifacts(operation, flow_run(operation, first).id)
    assert {"tiny-zero", "tiny-base", "tiny-mlflow", "tiny-results"} <= found.keys()
    assert (found["tiny-zero"].type, found["tiny-zero"].data) == ("progress", 100.0)
    assert "zero: done after" in found["tiny-zero"].description
    assert found["tiny-zero"].task_run_id is not None
    assert record["mlflow"]["parent_run_id"] in found["tiny-mlflow"].data
    for model, row in record["models"].items():
        assert f"| {escaped(model)} | {row['accuracy']:.4g} |" in found["tiny-results"].data


def test_prefect_s_form_is_typed_and_described(operation: Operation) -> None:
    facts = operation.r1("deploy", TINY, "--stage", "zero", "--cron", "0 3 1 1 *", *operation.sets())
    assert facts["deployment"] == "r1-stage/tiny-zero"
    with operation.client() as client:
        deployment = client.read_deployment_by_name("r1-stage/tiny-zero")
        assert deployment.enforce_parameter_schema
        fields = deployment.parameter_openapi_schema["properties"]
        assert {"stage", "config", "overrides", "fresh", "retries", "retry_delay"} == fields.keys()
        assert fields["fresh"]["type"] == "boolean"
        assert fields["retries"]["maximum"] == 20
        assert all(field["description"] for field in fields.values())
        with pytest.raises(httpx.HTTPStatusError):  # the server refuses it, before any worker sees it
            client.create_flow_run_from_deployment(deployment.id, parameters={"retries": "many"})


def test_a_run_cancelled_in_the_middle_of_training_is_resumed_to_the_same_digests(operation: Operation) -> None:
    long = ("stages.zero.steps=40",)
    runs = operation.folder / "cancelled"
    operation.r1("deploy", TINY, "--cron", "0 3 1 1 *", "--name", "long", *operation.sets(*long, runs=runs))
    run_now(operation, "r1-config/long", until_stage="zero")
    log = operation.folder / "worker.log"
    wait_for("middle of the training", lambda: len(journal(runs)) >= 5, 240, log)
    (record,) = operation.records(runs)
    with operation.client() as client:
        client.set_flow_run_state(flow_run(operation, record["run"]).id, Cancelling(message="somebody asked for it"))
    wait_for("end of the run", lambda: operation.records(runs)[0]["status"] != "running", 60, log)
    (record,) = operation.records(runs)
    assert (record["status"], record["stages"]["zero"]["status"]) == ("interrupted", "interrupted")
    wait_for("state", lambda: state(operation, record["run"]) == "CANCELLED", 60, log)
    (zero,) = runs.glob("stages/rl-*")
    assert '"interrupted"' in (zero / "attempts" / "1" / "outcome.json").read_text()  # it was asked, not killed
    assert 5 <= len(journal(runs)) < 40
    left = [p for p in psutil.process_iter(["cmdline"]) if str(zero) in (p.info["cmdline"] or [])]
    assert not left, "something of the stage goes on"

    resumed = operation.r1("resume", record["run"], "--runs", runs)
    assert resumed["status"] == "done"
    whole = operation.folder / "whole"
    operation.r1("run", TINY, "--until", "zero", *operation.sets(*long, runs=whole))
    (again,), (undisturbed,) = operation.records(runs), operation.records(whole)
    assert digests(again) == digests(undisturbed)
    assert digests(again).keys() == {"base", "zero"}
    plain = [
        [{k: v for k, v in line.metrics.items() if not k.startswith("time/")} for line in journal(r)] for r in (runs, whole)
    ]
    assert plain[0] == plain[1]


def metrics(runs: Path) -> list[dict[str, float]]:
    """What a training stage wrote in its journal, without times."""
    return [{key: value for key, value in line.metrics.items() if not key.startswith("time/")} for line in journal(runs)]


def slots_of(operation: Operation, name: str) -> int:
    with operation.client() as client:
        return int(client.read_global_concurrency_limit_by_name(name).active_slots)


def test_slots_that_were_given_away_are_taken_again(operation: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an outage that was longer than the lease: whoever holds them goes on, and asks until they are free again."""
    monkeypatch.setattr(slots, "RENEW_SECONDS", 1.0)
    monkeypatch.setattr(slots, "RETRY_SECONDS", 0.5)
    told, leases, real = list[str](), list[UUID](), slots._take

    def take(*arguments: Any) -> UUID:
        leases.append(real(*arguments))
        return leases[-1]

    monkeypatch.setattr(slots, "_take", take)
    with operation.client() as client:
        with (
            pytest.raises(UserError, match="the Prefect server has no limit `pair`; make it: `prefect gcl create pair"),
            slots.hold_slots("pair", 1, told.append),
        ):
            pass
        client.upsert_global_concurrency_limit_by_name("pair", 2)
        with (
            pytest.raises(UserError, match="the stage needs 3 slots of `pair`, which has 2"),
            slots.hold_slots("pair", 3, told.append),
        ):
            pass
        with slots.hold_slots("pair", 2, told.append):
            assert slots_of(operation, "pair") == 2
            client.release_concurrency_slots_with_lease(leases[0])
            assert slots_of(operation, "pair") == 0
            wait_for("slots", lambda: slots_of(operation, "pair") == 2, 20)
        wait_for("free slots", lambda: slots_of(operation, "pair") == 0, 20)
    assert told == [
        "the Prefect server has given the slots of `pair` away; the stage goes on and asks again",
        "the slots of `pair` are held again",
    ]


def test_stages_wait_for_slots_that_a_restarted_server_has_not_forgotten(operation: Operation) -> None:
    """The server is killed and started again while a stage waits for a slot, and again while it holds one."""

    def restart() -> None:
        os.killpg(operation.prefect.process.pid, signal.SIGKILL)
        operation.prefect.process.wait()
        assert operation.prefect.look()
        operation.prefect.wait_healthy()

    runs = operation.folder / "slots"
    assert operation.r1("deploy", "--slots", "gpu=1")["slots"] == {"gpu": 1}
    arguments = operation.sets("shared.compute.slots=gpu", "stages.zero.steps=300", runs=runs)
    log = operation.folder / "slots.log"
    with operation.client(), slots.hold_slots("gpu", 1, print):
        process = operation.start("slots", "-m", "flows.cli", "run", str(TINY), "--until", "zero", *arguments)
        wait_for("the wait", lambda: "waiting for 1 of the slots of `gpu`" in log.read_text(), 120, log)
        restart()
        assert slots_of(operation, "gpu") == 1
        assert operation.records(runs)[0]["stages"]["base"]["status"] == "pending"
        (base,) = runs.glob("stages/toy_base-*")
        assert (base / ".owner.json").exists()  # whoever waits for a slot has the folder's lock already
    wait_for("training", lambda: len(journal(runs)) >= 3, 180, log)
    assert slots_of(operation, "gpu") == 1
    restart()
    assert slots_of(operation, "gpu") == 1
    assert process.wait(300) == 0, log.read_text()
    assert len(journal(runs)) == 300
    assert len(list(runs.glob("stages/rl-*/attempts/*"))) == 1  # the outage did not end it
    wait_for("free slots", lambda: slots_of(operation, "gpu") == 0, 20)


def test_a_deployment_that_failed_three_times_is_paused(operation: Operation, tmp_path: Path) -> None:
    operation.r1("deploy", "--automations")
    config = tmp_path / "gone.yaml"
    config.write_text(f"extends: {TINY}")
    operation.r1("deploy", config, "--name", "failing", "--cron", "0 3 1 1 *", *operation.sets())
    config.unlink()

    def failed() -> int:
        with operation.client() as client:
            deployment = client.read_deployment_by_name("r1-config/failing")
            wanted = FlowRunFilterDeploymentId(any_=[deployment.id])
            runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(deployment_id=wanted))
        return sum(run.state.type.value == "FAILED" and "no such file" in run.state.message for run in runs)

    def paused() -> bool:
        with operation.client() as client:
            return bool(client.read_deployment_by_name("r1-config/failing").paused)

    for number in (1, 2, 3):
        assert not paused()
        run_now(operation, "r1-config/failing")
        wait_for("failure", lambda n=number: failed() == n, 120, operation.folder / "worker.log")
    wait_for("pause", paused, 60)


def test_a_run_whose_process_is_gone_is_marked_as_crashed(operation: Operation) -> None:
    assert len(operation.r1("deploy", "--automations")["automations"]) == 2
    assert len(operation.r1("deploy", "--automations")["automations"]) == 2
    with operation.client() as client:
        known = {automation.name: automation for automation in client.read_automations()}
        assert len(known) == 2  # registered twice, there once
        declared = yaml.safe_load((ROOT / "infra" / "automations.yaml").read_text())["automations"][0]
        declared["trigger"]["within"] = 40  # the life signs come every 30 s; five minutes are too long for a test
        client.update_automation(known[declared["name"]].id, AutomationCore.model_validate(declared))
    runs = operation.folder / "gone"
    arguments = ["run", str(TINY), "--until", "zero", *operation.sets("stages.zero.steps=2000", runs=runs)]
    process = operation.start("gone", "-m", "flows.cli", *arguments)
    wait_for("training", lambda: len(journal(runs)) >= 3, 180)
    name = operation.records(runs)[0]["run"]
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in tree:
        member.kill()
    process.wait()
    assert state(operation, name) == "RUNNING"
    wait_for("crash", lambda: state(operation, name) == "CRASHED", 240)
    assert "No sign of life" in flow_run(operation, name).state.message
