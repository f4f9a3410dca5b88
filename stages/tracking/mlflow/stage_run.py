"""A stage in MLflow: a child run, fed from the stage's journal."""

import contextlib
from collections.abc import Callable
from typing import Any, Literal

from mlflow.entities import Param

from stages.contract.errors import UserError
from stages.store.files import digest_json, read_json
from stages.store.folders import StageFolder
from stages.store.manifest import GATE, LEARNING, Manifest
from stages.tracking.journal import Follower, Line
from stages.tracking.mlflow.artifacts import log_records
from stages.tracking.mlflow.client import Connection, now
from stages.tracking.mlflow.registry import log_verdict
from stages.tracking.mlflow.sender import Sender

Status = Literal["FINISHED", "FAILED", "KILLED"]
PARENT_TAG = "mlflow.parentRunId"
"""Tag under which MLflow's page shows a run below another."""
LEARNING_TAG = "r1.learning"
"""Tag of a training stage's run: `learned`, or why not (stages/rewards/learning.py)."""
LONGEST_NOTE = 5000
"""Characters of the remarks that become the description of a stage's run: MLflow refuses values that are much longer."""
STAGE_SECONDS = 5.0
"""How long the begin and the end of a stage wait for an MLflow that answers. For one that is away they do not wait."""


class StageTracking:
    """The child run of a stage. `run_id` is empty until MLflow has answered."""

    def __init__(
        self,
        connection: Connection,
        sender: Sender,
        parent: Callable[[], str],
        name: str,
        folder: StageFolder,
        run_id: str | None,
        tags: dict[str, str],
    ) -> None:
        """Begin to follow the journal. `parent`: gives the id of the parent run, empty as long as there is none."""
        self.run_id = ""
        self._connection, self._sender, self._parent = connection, sender, parent
        self._name, self._folder, self._wanted, self._tags = name, folder, run_id, tags
        self._follower, self._sent, self._started = Follower(folder.journal), 0, now()
        self._waiting: list[Line] = []
        self._end: tuple[Status, Manifest | None, int] | None = None
        self._over = False
        sender.add(name, self._tell)
        sender.wait(lambda: bool(self.run_id), STAGE_SECONDS)

    def finish(self, status: Status, manifest: Manifest | None) -> None:
        """The journal is complete: what is left of it is sent, then the records of a stage that is done, then the run ends.

        Waits at most `STAGE_SECONDS`, not at all when MLflow is away or somebody wants this process to end.
        """
        self._end = (status, manifest, now())
        self._sender.wake()
        if status != "KILLED":
            self._sender.wait(lambda: self._over, STAGE_SECONDS)

    def _tell(self) -> bool:
        if not (parent := self._parent()):
            return False
        end = self._end  # read first: the journal is complete once it is set
        if not self.run_id:
            self._make(parent)
        self._send()
        if end is not None:
            self._conclude(*end)
            self._over = True
        return self._over

    def _make(self, parent: str) -> None:
        client = self._connection.client()
        record = self._record()
        config = record.get("config", {})
        run = self._connection.continued(self._wanted, {PARENT_TAG: parent, "stage": self._name})
        if run is None:
            tags = {PARENT_TAG: parent, "folder": str(self._folder.path), **self._tags, "stage": self._name}
            tags |= {key: record[key] for key in ("kind", "fingerprint") if key in record}
            tags["config_digest"] = digest_json(config)
            run = client.create_run(self._connection.experiment_id, self._started, tags, self._name)
        elif run.data.tags.get(PARENT_TAG) != parent:  # somebody has deleted the earlier parent run, which would hide this one
            client.set_tag(run.info.run_id, PARENT_TAG, parent)
        self._sent = self._connection.last_step(run.info.run_id, _readable(Follower(self._folder.journal)))
        if not run.data.params:  # a param cannot be changed: they are logged once
            client.log_dict(run.info.run_id, record, "config.json")
            scalars = [Param(key, str(value)[:500]) for key, value in config.items() if is_scalar(value)]
            client.log_batch(run.info.run_id, params=scalars)
        self.run_id = run.info.run_id

    def _record(self) -> dict[str, Any]:
        try:
            record: dict[str, Any] = read_json(self._folder.config)
        except (OSError, ValueError):  # whoever needs it more will say so
            return {}
        return record

    def _send(self) -> None:
        # A journal that was cut back is read from its start again; steps already sent are passed over.
        seen = max([self._sent, *(line.step for line in self._waiting)])
        for line in _readable(self._follower):
            if line.step > seen:
                self._waiting.append(line)
        while self._waiting:
            count = self._connection.send(self.run_id, self._waiting)
            self._sent = self._waiting[count - 1].step
            del self._waiting[:count]

    def _conclude(self, status: Status, manifest: Manifest | None, ended: int) -> None:
        client = self._connection.client()
        if manifest is not None:
            connection = self._connection
            model = log_records(client, connection.experiment_id, self.run_id, self._name, self._folder, manifest)
            if isinstance(learning := manifest.notes.get(LEARNING), dict):
                client.set_tag(self.run_id, LEARNING_TAG, str(learning.get("outcome")))
            if manifest.remarks:
                client.set_tag(self.run_id, "mlflow.note.content", "\n\n".join(manifest.remarks)[:LONGEST_NOTE])
            if GATE in manifest.notes:
                run_ids = (self._parent(), self.run_id)
                log_verdict(client, connection.experiment, *run_ids, self._name, self._folder, manifest, model)
        client.set_terminated(self.run_id, status, ended)


def _readable(follower: Follower) -> list[Line]:
    """The new lines; a damaged one ends them, until the stage has cut its journal back or the run has ended because of it."""
    lines: list[Line] = []
    with contextlib.suppress(UserError):
        lines.extend(follower.new_lines())
    return lines


def is_scalar(value: Any) -> bool:
    """Whether a config's value can be a param."""
    return isinstance(value, str | int | float)
