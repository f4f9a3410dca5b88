"""Databases that are copied, not made by migrations: the same tables, no trace of where they were made, nothing replaced."""

import contextlib
import errno
import os
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from mlflow import MlflowClient

from stages.store import empty_databases
from stages.store.empty_databases import make, place
from stages.tracking.mlflow.client import Connection


@pytest.fixture
def templates(tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment's templates, MLflow's alone."""
    folder = tmp_path / "environment"
    folder.mkdir()
    shutil.copy(mlflow_database, folder / "mlflow.db")
    monkeypatch.setattr(empty_databases, "template", lambda package: folder / f"{package}.db")
    return folder


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def rows(database: Path) -> dict[str, int]:
    """Tables that have rows, and how many."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        counts = {table: connection.execute(f"SELECT count(*) FROM '{table}'").fetchone()[0] for table in tables}
    return {table: count for table, count in counts.items() if count}


def test_mlflow_takes_the_copy_for_its_own(tmp_path: Path, templates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = tmp_path / "mlflow.db"
    assert place("mlflow", database)
    assert rows(database) == {"alembic_version": 1, "workspaces": 1}  # nobody's experiments, and no run
    monkeypatch.chdir(tmp_path)
    client = MlflowClient(f"sqlite:///{database}")
    run = client.create_run(client.create_experiment("mine")).info.run_id
    client.log_metric(run, "reward", 0.5, step=3)
    assert client.get_metric_history(run, "reward")[0].value == 0.5
    (default,) = [found for found in client.search_experiments() if found.name == "Default"]
    assert Path(default.artifact_location).is_relative_to(tmp_path)


def test_a_database_that_is_there_stays(tmp_path: Path, templates: Path) -> None:
    database = tmp_path / "mlflow.db"
    database.write_bytes(b"the user's")
    assert not place("mlflow", database)
    assert database.read_bytes() == b"the user's"


def test_what_another_process_has_made_meanwhile_stays(
    tmp_path: Path, templates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, copy = tmp_path / "mlflow.db", shutil.copyfile

    def slow_copy(source: Path, goal: Path) -> None:
        copy(source, goal)
        database.write_bytes(b"another's")

    monkeypatch.setattr(shutil, "copyfile", slow_copy)
    assert not place("mlflow", database)
    assert database.read_bytes() == b"another's"
    assert files(tmp_path) == ["environment", "mlflow.db"]


def test_of_many_at_once_one_copies(tmp_path: Path, templates: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        placed = list(pool.map(lambda _: place("mlflow", tmp_path / "mlflow.db"), range(8)))
    assert sum(placed) == 1
    assert files(tmp_path) == ["environment", "mlflow.db"]


def test_without_a_template_or_room_there_is_none(tmp_path: Path, templates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not place("prefect", tmp_path / "prefect.db")
    assert not place("mlflow", tmp_path / "no such folder" / "mlflow.db")

    def full(source: Path, goal: Path) -> None:
        goal.write_bytes(source.read_bytes()[:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    assert not place("mlflow", tmp_path / "mlflow.db")
    assert files(tmp_path) == ["environment"]


@pytest.mark.slow
def test_prefect_makes_all_its_tables_and_the_users_database_stays_out_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("PREFECT_HOME", str(home))
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{home}/own.db")
    made = make("prefect", tmp_path)
    assert files(home) == []
    with contextlib.closing(sqlite3.connect(made)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    from prefect.server.database.orm_models import Base

    assert set(Base.metadata.tables) <= tables
    assert rows(made).keys() <= {"alembic_version", "concurrency_limit_v2", "configuration"}


@pytest.mark.parametrize("uri", ["sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true", "sqlite:///own.db?timeout=5"])
def test_an_address_with_more_than_a_path_leaves_no_stray_file(
    tmp_path: Path, templates: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Connection(uri, "mine")
    assert {name for name in files(tmp_path) if name not in ("environment", "mlruns")} <= {"own.db"}


def test_another_distribution_of_mlflow_has_no_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: (_ for _ in ()).throw(PackageNotFoundError(name)))
    assert not place("mlflow", tmp_path / "mlflow.db")
