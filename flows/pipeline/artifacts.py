"""What Prefect's page of a run shows besides its states: how far each stage is, where MLflow and the report are, the results.

A thread of its own sends them, the newest of each, so that nothing waits for a server that is away; what was not sent when the
run ends is left out, for all of it is on disk.
"""

import contextvars
import re
import threading
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any
from uuid import UUID

import httpx
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.runtime import flow_run, task_run

from flows.pipeline.figures import figures
from flows.pipeline.progress import Progress
from flows.runs.markdown import escaped
from flows.runs.record import RunRecord
from flows.servers.prefect_client import impatient_client
from stages.tracking.journal import Line

PAUSE_SECONDS = 5.0
"""Pause between two updates."""
END_SECONDS = 5.0
"""How long the end of a run waits for the last of them."""


class Artifacts:
    """Shows a run's progress in Prefect, and wherever else it is shown (`shown`)."""

    def __init__(self, shown: Progress, record: RunRecord, flow_run_id: str | None = None) -> None:
        """`flow_run_id`: the run in Prefect; by default the one that this thread is in."""
        self._shown, self._record = shown, record
        self._recipe = str(record.content["document"]["name"])
        self._flow_run = _uuid(flow_run_id or flow_run.id)
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._waiting: dict[str, ArtifactCreate] = {}
        self._begun: dict[str, ArtifactCreate] = {}
        self._known: dict[str, UUID] = {}
        context = contextvars.copy_context()  # Prefect's settings live there
        self._thread = threading.Thread(target=context.run, args=(self._run,), daemon=True, name="artifacts")
        self._thread.start()

    def note(self, text: str) -> None:
        """Say something about the run."""
        self._shown.note(text)

    def begin(self, stage: str, kind: str) -> None:
        """A stage begins; to be called in its task."""
        self._shown.begin(stage, kind)
        key, owner = _key(self._recipe, stage), _uuid(task_run.id)
        self._begun[stage] = ArtifactCreate(
            key=key, type="progress", data=0.0, description=f"{stage} begins", flow_run_id=self._flow_run, task_run_id=owner
        )
        self._put(self._begun[stage])

    def line(self, stage: str, line: Line) -> None:
        """A step of a stage that runs has finished."""
        self._shown.line(stage, line)
        share = round(100 * line.step / line.of, 1) if line.of else 0.0
        self._progress(stage, f"{stage}: {line.step} of {line.of}  {figures(line)}".rstrip(), share)

    def end(self, stage: str, status: str, seconds: float | None) -> None:
        """The stage has ended."""
        self._shown.end(stage, status, seconds)
        took = f" after {seconds:.1f} s" if seconds is not None else ""
        self._progress(stage, f"{stage}: {status}{took}", 100.0 if status == "done" else None)

    def _progress(self, stage: str, text: str, share: float | None) -> None:
        if stage not in self._begun:  # a stage that was finished before
            return
        changes = {"description": text, **({} if share is None else {"data": share})}
        self._begun[stage] = self._begun[stage].model_copy(update=changes)
        self._put(self._begun[stage])

    def curves(self) -> None:
        """Link the run in MLflow, where a browser can follow it."""
        if (address := _curves(self._record)) is not None:
            self._page("mlflow", f"[Curves and records in MLflow]({address})", "The run in MLflow")

    def results(self) -> None:
        """The table of results, with what has to be known of them and where to look."""
        lines = [*_table(self._record.content["models"]), *(f"- {escaped(remark)}" for remark in self._record.remarks())]
        if (address := _curves(self._record)) is not None:
            lines.append(f"- [Curves and records in MLflow]({address})")
        if (report := self._record.report()) is not None:
            lines.append(f"- [Report]({report.absolute().as_uri()}): `{report}`")
        text = "\n".join([f"# {self._record.name}: {self._record.content['status']}", "", *lines])
        self._page("results", text, f"Results of {self._record.name}")

    def _page(self, name: str, text: str, description: str) -> None:
        key = _key(self._recipe, name)
        self._put(ArtifactCreate(key=key, type="markdown", data=text, description=description, flow_run_id=self._flow_run))

    def close(self, seconds: float = END_SECONDS) -> None:
        """Nothing more will come; what waits is sent now, if the server takes it within so many seconds."""
        self._shown.close()
        self._closing.set()
        self._thread.join(seconds)

    def _put(self, artifact: ArtifactCreate) -> None:
        with self._lock:
            self._waiting[str(artifact.key)] = artifact

    def _run(self) -> None:
        closing = False
        while not closing:
            closing = self._closing.wait(PAUSE_SECONDS)
            try:
                self._send()
            except httpx.HTTPError:  # away: the newest of each waits
                continue

    def _send(self) -> None:
        with self._lock:
            waiting = dict(self._waiting)
        if not waiting:
            return
        with impatient_client() as client:
            for key, artifact in waiting.items():
                try:
                    if key in self._known:
                        update = ArtifactUpdate(data=artifact.data, description=artifact.description)
                        client.update_artifact(self._known[key], update)
                    else:
                        self._known[key] = client.create_artifact(artifact).id
                except httpx.HTTPStatusError as error:
                    if error.response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
                        raise
                with self._lock:
                    if self._waiting.get(key) is artifact:
                        del self._waiting[key]


def _key(*parts: str) -> str:
    """Prefect takes small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def _uuid(text: Any) -> UUID | None:
    return UUID(str(text)) if text else None


def _curves(record: RunRecord) -> str | None:
    facts = record.content["mlflow"]
    uri, run = facts["tracking_uri"] or "", facts["parent_run_id"]
    if not (run and uri.startswith(("http://", "https://"))):
        return None
    return f"{uri.rstrip('/')}/#/experiments/{facts['experiment_id']}/runs/{run}"


def _table(models: dict[str, dict[str, float]]) -> Iterator[str]:
    """The lines of `r1 run`'s table in Markdown."""
    if not models:
        return
    columns = ("accuracy", "accuracy_stderr", "mean_length", "format", "language", "truncated", "problems", "samples")
    yield f"| model | {' | '.join(columns)} |"
    yield f"|---|{'---|' * len(columns)}"
    for label, row in models.items():
        cells = (f"{row[column]:.4g}" if row.get(column) is not None else "" for column in columns)
        yield f"| {escaped(label)} | {' | '.join(cells)} |"
    yield ""
