"""A pipeline in MLflow: one parent run per `r1 run`, one child run per stage, fed from the stages' journals.

It lives in the parent process, so that a stage needs no MLflow and loses nothing when MLflow is away: every line waits in the
journal. What could not be sent before a stage ended is sent when its run is next continued (`r1 resume`), or when the
stage is next reused.
"""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mlflow.entities import Metric, Param

from stages.store.errors import UserError
from stages.store.files import digest_json, read_json
from stages.store.folders import StageFolder
from stages.store.manifest import Manifest
from stages.tracking.compare import compare
from stages.tracking.journal import Follower, Line, read
from stages.tracking.mlflow_client import AWAY, Connection, default_uri, logger, metric_name, reason
from stages.tracking.mlflow_records import log_records

__all__ = ["PipelineTracking", "StageTracking", "compare", "default_uri"]

Status = Literal["FINISHED", "FAILED", "KILLED"]
PARENT_FIELDS = ("seed", "lr", "steps", "epochs", "questions", "samples")
"""Fields of stages that become params of the parent run; the whole configuration is its artifact `config.json`."""
RESULTS = ("accuracy", "accuracy_stderr", "cons_at_k", "mean_length", "format", "language", "truncated")
"""Headline results of a model on the parent run. MLflow's compare page shows 40 metrics at most: these, for five models."""
POLL_SECONDS = 1.0
AWAY_SECONDS = 3.0
"""How long the end of a stage waits for an MLflow that does not answer."""
FLUSH_SECONDS = 30.0
"""How long the end of a stage waits for an MLflow that answers."""


class PipelineTracking:
    """The parent run. `parent_run_id` and `experiment_id` are empty until MLflow has answered."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        parent_run_id: str | None,
        *,
        document: dict[str, Any],
        tags: dict[str, str],
    ) -> None:
        """Create the parent run, or continue the one named.

        `document`: the resolved configuration; `tags`: git_sha, prefect_flow_run_id and the like.
        Raises UserError when MLflow cannot use the URI. A server that does not answer is no error.
        """
        self._connection = Connection(uri, experiment)
        self._run_name, self._document, self._tags = run_name, document, dict(tags)
        self._wanted, self.parent_run_id = parent_run_id, ""
        self._lock = threading.Lock()
        try:
            self.ready()
        except AWAY as error:
            logger.warning("MLflow does not answer at %s; metrics wait in the journals (%s)", uri, reason(error))

    @property
    def experiment_id(self) -> str:
        """Id of the experiment, empty until MLflow has answered."""
        return self._connection.experiment_id

    def ready(self) -> Connection:
        """The connection, the parent run being there.

        Raises one of `AWAY` when MLflow does not answer.
        """
        with self._lock:
            if not self.parent_run_id:
                client = self._connection.client()
                if (run := self._connection.continued(self._wanted)) is None:
                    tags = {"config_digest": digest_json(self._document), **_source_tags(self._tags)}
                    run = client.create_run(self.experiment_id, run_name=self._run_name, tags=tags)
                    self._wanted = run.info.run_id
                if not run.data.params:
                    client.log_dict(run.info.run_id, self._document, "config.json")
                    client.log_batch(run.info.run_id, params=_params(self._document))
                self.parent_run_id = run.info.run_id
        return self._connection

    def stage(
        self,
        name: str,
        folder: StageFolder,
        run_id: str | None,
        *,
        reused_from: str | None = None,
        tags: dict[str, str] | None = None,
    ) -> "StageTracking":
        """Create the child run of a stage, or continue the one named. `reused_from`: the folder of a stage done earlier."""
        marks = {**_source_tags(self._tags), **(tags or {}), "stage": name}
        if reused_from is not None:
            marks["reused_from"] = reused_from
        tracking = StageTracking(self, name, folder, run_id, marks)
        if self.parent_run_id:
            tracking.try_ready()
        return tracking

    def artifact(self, path: Path) -> None:
        """Log a small file (the report) on the parent run; nothing happens while MLflow is away."""
        try:
            self.ready().client().log_artifact(self.parent_run_id, str(path))
        except AWAY as error:
            logger.warning("%s did not reach MLflow (%s)", path.name, reason(error))

    def finish(self, status: Status, results: dict[str, dict[str, float]], remarks: Sequence[str] = ()) -> None:
        """End the parent run with the headline results per model (`eval/<model>/<metric>`); remarks are its description."""
        now = time.time_ns() // 1_000_000
        values = {
            metric_name(f"eval/{model}/{key}"): float(value)
            for model, metrics in results.items()
            for key, value in metrics.items()
            if key in RESULTS and isinstance(value, int | float)
        }
        try:
            client = self.ready().client()
            known = client.get_run(self.parent_run_id).data.metrics
            new = [Metric(key, value, now, 0) for key, value in values.items() if known.get(key) != value]
            client.log_batch(self.parent_run_id, metrics=new)
            if remarks:
                client.set_tag(self.parent_run_id, "mlflow.note.content", "\n\n".join(remarks))
            client.set_terminated(self.parent_run_id, status)
        except AWAY as error:
            logger.warning("the results did not reach MLflow (%s); `r1 resume` sends them", reason(error))


class StageTracking:
    """The child run of a stage. `run_id` is empty until MLflow has answered."""

    def __init__(
        self, pipeline: PipelineTracking, name: str, folder: StageFolder, run_id: str | None, tags: dict[str, str]
    ) -> None:
        self.run_id = ""
        self._pipeline, self._name, self._folder, self._wanted, self._tags = pipeline, name, folder, run_id, tags
        self._follower, self._sent = Follower(folder.journal), 0
        self._waiting: list[Line] = []
        self._end: tuple[Status, Manifest | None] | None = None
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._deadline = float("inf")

    def try_ready(self) -> None:
        """Make the run if MLflow answers."""
        try:
            self._ready()
        except AWAY as error:
            logger.warning("MLflow does not answer; `%s` waits in its journal (%s)", self._name, reason(error))

    def start(self) -> None:
        """Follow the journal in the background and send its lines in order. Never raises."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._follow, daemon=True, name=f"mlflow-{self._name}")
            self._thread.start()

    def finish(self, status: Status, manifest: Manifest | None) -> None:
        """Send what is left, log the records of a stage that is done, end the run. Waits a bounded time, never raises."""
        self._end = (status, manifest)
        self._deadline = time.monotonic() + AWAY_SECONDS
        self.start()
        self._wake.set()
        assert self._thread is not None
        self._thread.join(FLUSH_SECONDS)
        if self._thread.is_alive():
            logger.warning("MLflow is slow: `%s` goes on being sent in the background", self._name)

    def _follow(self) -> None:
        warned = False
        while True:
            end = self._end  # read first: the journal is complete once it is set
            try:
                connection = self._ready()
                self._send(connection)
                if end is not None:
                    self._conclude(connection, *end)
                    return
                pause, warned = POLL_SECONDS, False
            except UserError as error:
                logger.warning("%s", error)
                return
            except AWAY as error:
                if time.monotonic() > self._deadline:
                    logger.warning("`%s` is not whole in MLflow (%s); its journal is", self._name, reason(error))
                    return
                if not warned:
                    logger.warning("MLflow does not answer; `%s` waits (%s)", self._name, reason(error))
                pause, warned = (POLL_SECONDS if end else 5 * POLL_SECONDS), True
            if end is None:
                self._wake.wait(pause)
            else:
                time.sleep(pause)

    def _ready(self) -> Connection:
        connection = self._pipeline.ready()
        if self.run_id:
            return connection
        client = connection.client()
        record = read_json(self._folder.config) if self._folder.config.exists() else {}
        config = record.get("config", {})
        if (run := connection.continued(self._wanted)) is None:
            tags = {"mlflow.parentRunId": self._pipeline.parent_run_id, "folder": str(self._folder.path), **self._tags}
            tags |= {key: record[key] for key in ("kind", "fingerprint") if key in record}
            tags["config_digest"] = digest_json(config)
            run = client.create_run(connection.experiment_id, run_name=self._name, tags=tags)
            self._wanted = run.info.run_id
        else:
            self._sent = connection.last_step(run.info.run_id, read(self._folder.journal))
        if not run.data.params:  # a param cannot be changed: they are logged once
            client.log_dict(run.info.run_id, record, "config.json")
            scalars = [Param(key, str(value)[:500]) for key, value in config.items() if _is_scalar(value)]
            client.log_batch(run.info.run_id, params=scalars)
        self.run_id = run.info.run_id
        return connection

    def _send(self, connection: Connection) -> None:
        # A journal that was cut back is read from its start again; steps already sent are passed over.
        seen = max([self._sent, *(line.step for line in self._waiting)])
        for line in self._follower.new_lines():
            if line.step > seen:
                self._waiting.append(line)
        while self._waiting:
            count = connection.send(self.run_id, self._waiting)
            self._sent = self._waiting[count - 1].step
            del self._waiting[:count]

    def _conclude(self, connection: Connection, status: Status, manifest: Manifest | None) -> None:
        client = connection.client()
        if manifest is not None:
            log_records(client, connection.experiment_id, self.run_id, self._name, self._folder, manifest)
        client.set_terminated(self.run_id, status)


def _source_tags(tags: dict[str, str]) -> dict[str, str]:
    return tags | ({"mlflow.source.git.commit": tags["git_sha"]} if "git_sha" in tags else {})


def _params(document: dict[str, Any]) -> list[Param]:
    stages = document.get("stages", {})
    found = {
        f"{name}.{field}": str(section[field])[:500]
        for name, section in stages.items()
        for field in PARENT_FIELDS
        if _is_scalar(section.get(field))
    }
    seeds = {value for key, value in found.items() if key.endswith(".seed")}
    if len(seeds) == 1:  # the usual case: one seed for all
        found = {"seed": seeds.pop(), **{key: value for key, value in found.items() if not key.endswith(".seed")}}
    return [Param(key, value) for key, value in found.items()]


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float)
