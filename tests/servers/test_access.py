"""Who may reach the servers of `r1 up`, and which databases they take: what is refused, and what the servers are told."""

import sys
from pathlib import Path
from typing import Any

import pytest

from flows.servers import serve
from flows.servers.access import access
from flows.servers.databases import in_folder, in_postgres
from flows.servers.server_process import demand_free, free_port
from stages.contract.errors import UserError
from tests.requirements import require

SECRETS = {
    "PREFECT_API_AUTH_STRING": "ann:first-secret",
    "MLFLOW_TRACKING_USERNAME": "bob",
    "MLFLOW_TRACKING_PASSWORD": "second-secret",
}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_loopback_asks_nobody(host: str) -> None:
    found = access(host, None, asked=False, environment=SECRETS)
    assert (found.prefect, found.mlflow, found.names) == (None, None, ())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.7.7", "node1"])
@pytest.mark.parametrize("missing", SECRETS)
def test_other_machines_need_every_credential(host: str, missing: str) -> None:
    environment = {key: value for key, value in SECRETS.items() if key != missing}
    with pytest.raises(UserError, match="so they need credentials; export PREFECT_API_AUTH_STRING=") as caught:
        access(host, None, asked=False, environment=environment)
    assert caught.value.where == "--host"
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PREFECT_API_AUTH_STRING", "ann"),
        ("PREFECT_API_AUTH_STRING", ":secret"),
        ("PREFECT_API_AUTH_STRING", "änn:secret"),
        ("MLFLOW_TRACKING_USERNAME", "b:b"),
        ("MLFLOW_TRACKING_PASSWORD", "elevenchars"),
    ],
)
def test_credentials_that_the_servers_would_not_take(variable: str, value: str) -> None:
    with pytest.raises(UserError) as caught:
        access("127.0.0.1", None, asked=True, environment={**SECRETS, variable: value})
    assert value not in str(caught.value)


def test_a_star_would_let_every_name_through() -> None:
    with pytest.raises(UserError, match="every name"):
        access("0.0.0.0", "a.example,*", asked=False, environment=SECRETS)


@pytest.mark.parametrize(("chosen", "expected"), [(None, "false"), ("true", "true")])
def test_mlflow_server_starts_without_background_jobs_unless_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None, expected: str
) -> None:
    started: list[tuple[Any, ...]] = []
    monkeypatch.setattr(serve, "Server", lambda *arguments: started.append(arguments))
    monkeypatch.delenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", raising=False)
    if chosen is not None:
        monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", chosen)
    serve._mlflow(tmp_path, 5000, access("127.0.0.1", None, asked=False, environment={}), in_folder(tmp_path))
    ((_, program, _, environment, *_),) = started
    assert (program, environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"]) == ("mlflow", expected)


def test_each_server_gets_its_own_secrets_only(tmp_path: Path) -> None:
    found = access("0.0.0.0", "a.example,10.0.0.7", asked=False, environment=SECRETS)
    inherited = {**SECRETS, "HOME": "/home/ann"}
    prefect = found.prefect_environment(inherited, 4200)
    mlflow = found.mlflow_environment(inherited, 5000, in_folder(tmp_path), tmp_path)
    assert prefect["HOME"] == mlflow["HOME"] == "/home/ann"
    assert [key for key, value in prefect.items() if "second" in value] == []
    assert [key for key, value in mlflow.items() if "first" in value] == []
    assert prefect["PREFECT_SERVER_API_AUTH_STRING"] == "ann:first-secret"
    assert mlflow["MLFLOW_AUTH_ADMIN_PASSWORD"] == "second-secret"
    assert len(mlflow["MLFLOW_FLASK_SERVER_SECRET_KEY"]) >= 32
    assert "secret" not in (tmp_path / "mlflow-auth.ini").read_text()
    assert "secret" not in repr(found)
    hosts = mlflow["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert {"a.example", "a.example:5000", "10.0.0.7:5000", "127.0.0.1:5000", "localhost"} <= set(hosts)
    assert "http://a.example:5000" in mlflow["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"].split(",")
    assert prefect["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"].split(",")[0] == "http://127.0.0.1:4200"


def test_where_this_machine_finds_them() -> None:
    places = {"0.0.0.0": "http://127.0.0.1:80", "::": "http://[::1]:80", "127.0.0.1": "http://127.0.0.1:80"}
    assert {host: access(host, None, asked=True, environment=SECRETS).local(80) for host in places} == places


@pytest.mark.parametrize(
    ("address", "names", "said"),
    [
        ("postgresql://me@127.0.0.1/", ("one", "one"), "--mlflow-database: Prefect and MLflow cannot share the database `one`"),
        ("postgresql://me:hidden@127.0.0.1/", ("a", "b"), "--postgres: a password in an address"),
        ("postgresql://me@127.0.0.1/?password=hidden", ("a", "b"), "--postgres: the address takes no `?` settings"),
        ("mysql://me:hidden@127.0.0.1/", ("a", "b"), "--postgres: `mysql` is not PostgreSQL"),
        ("me:hidden@127.0.0.1", ("a", "b"), "--postgres: that is no address of a PostgreSQL server"),
        ("postgresql://me:hidden@127.0.0.1:port/", ("a", "b"), "--postgres: that is no address of a PostgreSQL server"),
    ],
)
def test_addresses_that_are_refused(address: str, names: tuple[str, str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        in_postgres(address, *names)
    assert str(caught.value).startswith(said)
    assert "hidden" not in str(caught.value)


def test_a_postgres_that_is_not_there() -> None:
    require("psycopg2")
    with pytest.raises(UserError, match=r"--postgres: PostgreSQL cannot be used .*refused"):
        in_postgres(f"postgresql://me@127.0.0.1:{free_port()}/", "a", "b")


def test_a_driver_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(UserError, match=r"psycopg2 is not installed; pip install .*\[postgres\]"):
        in_postgres("postgresql://me@127.0.0.1/", "a", "b")


def test_an_address_of_another_machine() -> None:
    with pytest.raises(UserError, match=r"--host: `192\.0\.2\.1` is not an address of this machine"):
        demand_free("192.0.2.1", free_port(), "--prefect-port")
    with pytest.raises(UserError, match="--host: `no such host` is no address"):
        demand_free("no such host", 1, "--prefect-port")
