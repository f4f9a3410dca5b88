"""The connection to MLflow: made when it can be, tried again later when it cannot.

A tracking URI that cannot be right is the user's mistake and is raised; a server that does not answer is not: the journal on
disk has every line, and they are sent when it answers. Only the thread of `mlflow_sender` calls what may have to wait.
"""

import contextlib
import logging
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before the import: MLflow reads them when it is loaded, and its own defaults (7 retries, minutes) would hold a stage's end
# up while a server is away. The journal is the retry. What the user has set stays.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output is for our own JSON
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from stages.contract.errors import UserError
from stages.store.empty_databases import place
from stages.store.system_faults import system_fault
from stages.tracking.default_uri import SQLITE
from stages.tracking.journal import Line

AWAY = (MlflowException, OSError, SQLAlchemyError)
"""What MLflow and its transports raise when a call does not come through."""
BATCH = 1000
"""Most metrics that MLflow takes in one call."""
_FOREIGN_CODES = ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED", "PERMISSION_DENIED")
_FOREIGN_TEXTS = ("was not in a valid JSON format", "failed with error code 405")
"""What a server that is not MLflow's answers: 404, 501, 403, a page for people, or 405."""

logger = logging.getLogger("r1.tracking")


def metric_name(name: str) -> str:
    """A name MLflow takes: it refuses `,` and `@` among others.

    >>> metric_name("gsm8k/pass@8,none")
    'gsm8k/pass_8_none'
    """
    return re.sub(r"[^/\w.\- ]", "_", name, flags=re.ASCII)


def reason(error: BaseException) -> str:
    """An error as a short line for the log."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def now() -> int:
    """The time as MLflow counts it, in milliseconds."""
    return time.time_ns() // 1_000_000


def metrics_of(line: Line) -> list[Metric]:
    """Return the metrics of a journal line, with the line's own time and step.

    An infinite value is sent as NaN: MLflow's databases would keep 1.8e308 in its place.
    """
    values = {metric_name(name): value if math.isfinite(value) else math.nan for name, value in line.metrics.items()}
    return [Metric(name, float(value), line.time, line.step) for name, value in values.items()]


_DATABASE_HINTS = (
    (
        re.compile(r"database schema|Can't locate revision"),
        "install the MLflow that wrote it, or back it up and run `mlflow db upgrade`, or move it aside",
    ),
    (
        re.compile(r"not a database|malformed"),
        "it is damaged: move it aside; runs go into a new one, and `r1 resume` sends an earlier run there again",
    ),
)
"""What a database says at the first contact, and what to do."""


def _database_hint(error: BaseException) -> str:
    """What to do about a tracking URI that MLflow cannot use."""
    if (fault := system_fault(error)) is not None:
        return fault
    hint = next((hint for pattern, hint in _DATABASE_HINTS if pattern.search(str(error))), "")
    return hint or "for example sqlite:////absolute/mlflow.db or http://127.0.0.1:5000"


def _is_plain_file(database: str) -> bool:
    """Whether SQLite's database is a file by its path: neither in memory nor an address (`file:…`)."""
    return bool(database) and not database.startswith((":memory:", "file:"))


class Connection:
    """A client and an experiment. `experiment_id` is empty until MLflow has answered once."""

    def __init__(self, uri: str, experiment: str) -> None:
        """Check the URI; nothing is sent yet.

        Raises UserError when MLflow cannot use the URI at all.
        """
        # MLflow announces each new table of a fresh database.
        for name in ("mlflow.tracking", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # Of a database that fails it writes a traceback at each attempt; the error is raised too, and told once.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        self.uri, self.experiment, self.experiment_id = uri, experiment, ""
        try:
            if uri.startswith(SQLITE) and _is_plain_file(file := make_url(uri).database or ""):
                place("mlflow", Path(file))
            self._client = MlflowClient(uri)
        except (*AWAY, ImportError) as error:
            raise UserError(
                f"MLflow cannot use `{uri}` ({reason(error)})",
                where="tracking.uri",
                mend=_database_hint(error),
            ) from error

    def client(self) -> Any:
        """The client, the experiment being there.

        Raises one of `AWAY` when MLflow does not answer, UserError when the experiment was deleted, the credentials are not
        taken, or what answers is no MLflow server.
        """
        if not self.experiment_id:
            with self._credentials(), self._first_answer():
                self.experiment_id = self._find_experiment()
        return self._client

    def knock(self) -> None:
        """Ask something that changes nothing.

        Raises one of `AWAY` when MLflow does not answer, UserError when it does not take our credentials.
        """
        with self._credentials():
            self._client.search_experiments(max_results=1)

    @contextlib.contextmanager
    def _credentials(self) -> Iterator[None]:
        try:
            yield
        except MlflowException as error:
            if error.error_code == "UNAUTHENTICATED":
                what = f"MLflow at {self.uri} does not take these credentials"
                where = "MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD"
                raise UserError(what, where=where, mend="set them to a user and password of that server") from error
            raise

    @contextlib.contextmanager
    def _first_answer(self) -> Iterator[None]:
        """Take an answer that no MLflow server gives for a wrong address. Later ones are those of an outage: a proxy's page."""
        try:
            yield
        except MlflowException as error:
            text = str(error)
            if error.error_code in _FOREIGN_CODES or any(part in text for part in _FOREIGN_TEXTS):
                what = f"what answers at {self.uri} is no MLflow server, or does not let this client in ({reason(error)})"
                mend = "give the address of its page, such as http://127.0.0.1:5000 (called by a name: `r1 up --allowed-hosts`)"
                raise UserError(what, where="MLFLOW_TRACKING_URI or tracking.uri", mend=mend) from error
            raise

    def _find_experiment(self) -> str:
        found = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            artifacts = None
            if self.uri.startswith(SQLITE):
                artifacts = (Path(self.uri.removeprefix(SQLITE)).absolute().parent / "mlartifacts").as_uri()
            return str(self._client.create_experiment(self.experiment, artifact_location=artifacts))
        if found.lifecycle_stage != "active":
            command = f"MLFLOW_TRACKING_URI={self.uri} mlflow experiments restore -x {found.experiment_id}"
            raise UserError(
                f"the MLflow experiment `{self.experiment}` was deleted",
                where="tracking.experiment",
                mend=f"restore it with `{command}`, or start a run with another name for it",
            )
        return str(found.experiment_id)

    def continued(self, run_id: str | None, tags: dict[str, str]) -> Any | None:
        """The run to be continued, running again; None when there is none (another database, say).

        Without an id it is the run of these tags: a call that made it may have come through although its answer did not.
        """
        run = self._run(run_id) if run_id else None
        if run is None and tags:
            wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
            found = self.client().search_runs([self.experiment_id], wanted, max_results=1)
            run = found[0] if found else None
        if run is not None and run.info.status != "RUNNING":
            self.client().update_run(run.info.run_id, status="RUNNING")
        return run

    def _run(self, run_id: str) -> Any | None:
        try:
            run = self.client().get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def last_step(self, run_id: str, lines: list[Line]) -> int:
        """The last journal step that the run has, 0 for none.

        A line is sent whole, so it is there when any one of its metrics is: histories are asked for only as many metrics as
        it takes to meet every line.
        """
        last, left = 0, [line for line in lines if line.metrics]
        while left:
            counts: dict[str, int] = {}
            for line in left:
                for name in line.metrics:
                    counts[name] = counts.get(name, 0) + 1
            name = max(counts, key=lambda n: counts[n])
            history = self.client().get_metric_history(run_id, metric_name(name))
            last = max([last, *(metric.step for metric in history)])
            left = [line for line in left if name not in line.metrics]
        return last

    def send(self, run_id: str, lines: list[Line]) -> int:
        """Send as many whole lines, from the first, as one call takes; returns how many."""
        batch: list[Metric] = []
        count = 0
        for line in lines:
            if batch and len(batch) + len(line.metrics) > BATCH:
                break
            batch += metrics_of(line)
            count += 1
        if batch:
            self.client().log_batch(run_id, metrics=batch, params=[], tags=[])
        return count
