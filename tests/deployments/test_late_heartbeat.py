"""A heartbeat that arrives after a run has ended, with our automation on a real Prefect server (PrefectHQ/prefect#18653)."""

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events import RelatedResource
from prefect.events.filters import EventFilter, EventNameFilter, EventOccurredFilter
from prefect.events.schemas.automations import AutomationCore
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Completed, Crashed, Failed, Running, State

from flows.deployments.prefect_objects import AUTOMATIONS_FILE, make_automations
from tests.deployments.operation import wait_for
from tests.servers.stoppable import Stoppable

WITHIN = 10
"""Seconds instead of the automation's five minutes; the server takes no fewer."""


def declared() -> list[dict[str, Any]]:
    automations: list[dict[str, Any]] = yaml.safe_load(AUTOMATIONS_FILE.read_text(encoding="utf-8"))["automations"]
    return automations


def test_no_automation_forces_a_state() -> None:
    """Forced, a run that has ended could be marked as crashed: only orchestration rules keep it from that."""
    for automation in declared():
        parsed = AutomationCore.model_validate(automation)
        assert parsed.actions
        assert not any(getattr(action, "force", False) for action in parsed.actions)
    assert declared()[0]["actions"][0]["force"] is False  # written down, whatever the default will be


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPrefectClient]:
    server = Stoppable("prefect", tmp_path_factory.mktemp("late"))
    server.start()
    try:
        with temporary_settings({PREFECT_API_URL: f"{server.address}/api"}), get_client(sync_client=True) as found:
            assert len(make_automations()) == 2
            automation = declared()[0]
            automation["trigger"]["within"] = WITHIN
            known = {item.name: item.id for item in found.read_automations()}
            found.update_automation(known[automation["name"]], AutomationCore.model_validate(automation))
            yield found
    finally:
        server.end()


def ended_run(client: SyncPrefectClient, last: State[Any] | None) -> Any:
    """A flow run of ours that was running and, with `last`, has ended so."""

    @flow(name="r1")
    def ours() -> None:
        """Never run: its states are set here."""

    run = client.create_flow_run(ours, name=f"late-{uuid.uuid4().hex[:6]}")
    client.set_flow_run_state(run.id, Running())
    if last is not None:
        client.set_flow_run_state(run.id, last)
    return client.read_flow_run(run.id)


def beat(client: SyncPrefectClient, run: Any) -> None:
    """The event that Prefect's engine sends as a sign of life, after everything else."""
    related = [
        {"prefect.resource.id": f"prefect.flow.{run.flow_id}", "prefect.resource.role": "flow", "prefect.resource.name": "r1"}
    ]
    event = {
        "occurred": datetime.now(UTC).isoformat(),
        "event": "prefect.flow-run.heartbeat",
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run.id}", "prefect.resource.name": run.name},
        "related": [RelatedResource.model_validate(item).model_dump() for item in related],
        "id": str(uuid.uuid4()),
    }
    assert client._client.post("/events", json=[event]).status_code == 204


def refusals(client: SyncPrefectClient, since: datetime) -> dict[str, str]:
    """Run -> why the server did not change its state for an automation."""
    wanted = EventFilter(
        occurred=EventOccurredFilter(since=since), event=EventNameFilter(name=["prefect.automation.action.failed"])
    )
    page = client._client.post("/events/filter", json={"filter": wanted.model_dump(mode="json"), "limit": 50}).json()
    return {
        related["prefect.resource.id"]: event["payload"].get("reason", "")
        for event in page["events"]
        for related in event["related"]
        if related.get("prefect.resource.role") == "target"
    }


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_ended_run_keeps_its_state_when_a_heartbeat_comes_late(client: SyncPrefectClient, tmp_path: Path) -> None:
    began = datetime.now(UTC)
    ends = {"completed": Completed(), "failed": Failed(), "cancelled": Cancelled(), "crashed": Crashed(message="by itself")}
    ended = {name: ended_run(client, last) for name, last in ends.items()}
    gone = ended_run(client, None)
    for run in (*ended.values(), gone):
        beat(client, run)
    # The automation is on and works: the run that gave no further sign of life is marked.
    wait_for("mark on the run whose process is gone", lambda: client.read_flow_run(gone.id).state.is_crashed(), 90)
    assert "No sign of life" in client.read_flow_run(gone.id).state.message
    # It fires for the ended ones as well, and the server refuses each.
    before = {name: run.state.id for name, run in ended.items()}

    def acted_on(name: str) -> bool:
        refused = f"prefect.flow-run.{ended[name].id}" in refusals(client, began)
        return refused or client.read_flow_run(ended[name].id).state.id != before[name]

    wait_for("action on every ended run", lambda: all(map(acted_on, ended)), 60)
    for name, run in ended.items():
        now = client.read_flow_run(run.id).state
        assert (now.id, now.type) == (before[name], ends[name].type), name
    reasons = refusals(client, began)
    assert all("already in terminal state" in reasons[f"prefect.flow-run.{run.id}"] for run in ended.values())
