"""A pipeline in MLflow: one parent run per `r1 run`, one child run per stage, fed from the stages' journals.

It lives in the parent process, so that a stage needs no MLflow and loses nothing when MLflow is away: every line waits in the
journal, and is sent by a thread of the run's own (`mlflow_sender`) as soon as MLflow answers. What has not been sent when a
run ends, after a last wait, is sent when the run is next continued (`r1 resume`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param

from stages.store.files import digest_json
from stages.store.folders import StageFolder
from stages.tracking.compare import compare
from stages.tracking.default_uri import default_uri
from stages.tracking.mlflow.client import Connection, logger, metric_name, now
from stages.tracking.mlflow.experiment_page import arrange, describe
from stages.tracking.mlflow.sender import Sender
from stages.tracking.mlflow.stage_run import StageTracking, Status, is_scalar

__all__ = ["PipelineTracking", "StageTracking", "compare", "default_uri"]

PARENT_FIELDS = ("seed", "lr", "steps", "epochs", "questions", "samples")
"""Fields of stages that become params of the parent run; the whole configuration is its artifact `config.json`."""
RESULTS = ("accuracy", "mean_length", "accuracy_stderr", "language", "format", "truncated", "cons_at_k")
"""Headline results of a model on the parent run, the weightiest first."""
MOST_RESULTS = 39
"""Of them: more cannot be told apart where runs are compared. All for five models, the first three for ten."""
BEGIN_SECONDS = 10.0
"""How long the begin of a run waits for its MLflow run; a new database takes some seconds."""
END_SECONDS: dict[Status, float] = {"FINISHED": 120.0, "FAILED": 10.0, "KILLED": 5.0}
"""How long the end of a run waits for MLflow, also for one that is away. `r1 resume` sends what it did not get; after a
Prefect worker's SIGTERM a run has 30 s, most of which belong to the checkpoint."""
SILENT_SECONDS = 2.0
"""A wait longer than this is told."""


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
        identity: str | None = None,
        note: Callable[[str], None] = logger.warning,
    ) -> None:
        """Have the parent run created, or continue the one named.

        `document`: the resolved configuration; `tags`: git_sha, prefect_flow_run_id and the like; `identity`: a text that no
        other run has, by which the parent run is found when its id was never learned; `note` is told of outages.
        Raises UserError when MLflow cannot use the URI. A server that does not answer is no error.
        """
        self._connection = Connection(uri, experiment)
        self._run_name, self._document, self._tags = run_name, document, dict(tags)
        self._wanted, self.parent_run_id = parent_run_id, ""
        self._identity = {"identity": identity} if identity else {}
        self._started, self._stages = now(), dict[str, StageTracking]()
        self._note, self._sender = note, Sender(self._connection.knock, note)
        self._sender.add("the run", self._begin)
        self._sender.wait(lambda: bool(self.parent_run_id), BEGIN_SECONDS)
        if self._sender.mistake is not None:
            raise self._sender.mistake

    @property
    def experiment_id(self) -> str:
        """Id of the experiment, empty until MLflow has answered."""
        return self._connection.experiment_id

    @property
    def run_ids(self) -> dict[str, str]:
        """Stage name -> id of its run, of those that have one."""
        return {name: stage.run_id for name, stage in self._stages.items() if stage.run_id}

    def _begin(self) -> bool:
        client = self._connection.client()
        describe(client, self.experiment_id)
        if (run := self._connection.continued(self._wanted, self._identity)) is None:
            tags = {"config_digest": digest_json(self._document), **_source_tags(self._tags), **self._identity}
            run = client.create_run(self.experiment_id, self._started, tags, self._run_name)
        if not run.data.params:
            client.log_dict(run.info.run_id, self._document, "config.json")
            client.log_batch(run.info.run_id, params=_params(self._document))
        self.parent_run_id = run.info.run_id
        return True

    def stage(
        self,
        name: str,
        folder: StageFolder,
        run_id: str | None,
        *,
        reused_from: str | None = None,
        tags: dict[str, str] | None = None,
    ) -> "StageTracking":
        """Have the child run of a stage created, or continue the one named, and follow the stage's journal from now on.

        `reused_from`: the folder of a stage done earlier.
        """
        marks = {**_source_tags(self._tags), **(tags or {})}
        if reused_from is not None:
            marks["reused_from"] = reused_from
        stage = StageTracking(self._connection, self._sender, lambda: self.parent_run_id, name, folder, run_id, marks)
        self._stages[name] = stage
        return stage

    def artifact(self, path: Path) -> None:
        """Log a small file (the report) on the parent run."""

        def log() -> bool:
            if self.parent_run_id:
                self._connection.client().log_artifact(self.parent_run_id, str(path))
            return bool(self.parent_run_id)

        self._sender.add(path.name, log)

    def finish(self, status: Status, results: dict[str, dict[str, float]], remarks: Sequence[str] = ()) -> None:
        """End the parent run with the headline results per model (`eval/<model>/<metric>`); remarks are its description.

        Waits until MLflow has everything, at most `END_SECONDS`.
        """
        ended = now()
        shown = RESULTS[: max(1, MOST_RESULTS // max(1, len(results)))]
        values = {
            metric_name(f"eval/{model}/{key}"): float(value)
            for model, metrics in results.items()
            for key, value in metrics.items()
            if key in shown and isinstance(value, int | float)
        }

        # MLflow's compare page opens with the metric that was logged first: the accuracy of the recipe's last model.
        if accuracies := [value for name, value in values.items() if name.endswith("/accuracy")]:
            values = {"accuracy": accuracies[-1], **values}

        def conclude() -> bool:
            if not self.parent_run_id:
                return False
            client = self._connection.client()
            known = client.get_run(self.parent_run_id).data.metrics
            new = [Metric(key, value, ended, 0) for key, value in values.items() if known.get(key) != value]
            client.log_batch(self.parent_run_id, metrics=new)
            if remarks:
                client.set_tag(self.parent_run_id, "mlflow.note.content", "\n\n".join(remarks))
            arrange(client, self.experiment_id, list(results))
            client.set_terminated(self.parent_run_id, status, ended)
            return True

        self._sender.add("the results", conclude)
        self._sender.close()
        seconds = END_SECONDS[status]
        if not self._sender.wait(self._sender.settled, min(SILENT_SECONDS, seconds), patient=True):
            self._note(f"waiting for MLflow at {self._connection.uri}, {seconds:.0f} s at most (Ctrl-C ends the wait)")
            self._sender.wait(self._sender.settled, seconds - SILENT_SECONDS, patient=True)
        if missing := self._sender.waiting():
            self._note(f"not whole in MLflow: {', '.join(missing)}; all of it is on disk, and `r1 resume` sends it")
        self._sender.fall_silent()


def _source_tags(tags: dict[str, str]) -> dict[str, str]:
    return tags | ({"mlflow.source.git.commit": tags["git_sha"]} if "git_sha" in tags else {})


def _params(document: dict[str, Any]) -> list[Param]:
    stages = document.get("stages", {})
    found = {
        f"{name}.{field}": str(section[field])[:500]
        for name, section in stages.items()
        for field in PARENT_FIELDS
        if is_scalar(section.get(field))
    }
    seeds = {value for key, value in found.items() if key.endswith(".seed")}
    if len(seeds) == 1:  # the usual case: one seed for all
        found = {"seed": seeds.pop(), **{key: value for key, value in found.items() if not key.endswith(".seed")}}
    return [Param(key, value) for key, value in found.items()]
