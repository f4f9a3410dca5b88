"""Where the servers of `r1 up` keep their records: SQLite files in the runs folder, or two databases of a PostgreSQL server.

Prefect and MLflow never share a database, for both have a table `alembic_version`. No address here holds a password: the
drivers of both take it from PGPASSWORD or ~/.pgpass, so it is in no argument, file or log of ours.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stages.contract.errors import UserError

_OPTION = "--postgres"
_EXAMPLE = "for example postgresql://me@127.0.0.1:5432/"
_OWN_TABLES = {"Prefect": "flow_run", "MLflow": "experiments"}
"""A table by which a database is known to be somebody's already."""


@dataclass(frozen=True)
class Databases:
    """Addresses of both databases, as SQLAlchemy writes them. `prefect` None: the file in Prefect's home."""

    store: Literal["sqlite", "postgresql"]
    prefect: str | None
    mlflow: str

    def prefect_environment(self) -> dict[str, str]:
        """Variables by which a Prefect server finds its database."""
        return {} if self.prefect is None else {"PREFECT_SERVER_DATABASE_CONNECTION_URL": self.prefect}

    def mlflow_environment(self) -> dict[str, str]:
        """Variables by which an MLflow server finds its database."""
        return {"MLFLOW_BACKEND_STORE_URI": self.mlflow}


def in_folder(runs: Path) -> Databases:
    """SQLite, in the runs folder."""
    return Databases("sqlite", None, f"sqlite:///{runs / 'mlflow.db'}")


def in_postgres(address: str, prefect: str, mlflow: str) -> Databases:
    """Two databases of the PostgreSQL server at `address`; those that are not there yet are made.

    What the address leaves out (host, port, user), and what it must not hold (the password, how TLS is used), comes from
    libpq's own variables: PGHOST, PGPASSWORD, PGSSLMODE and the like.
    Raises UserError when the address or a name is wrong, the driver is missing, or the server does not let us in.
    """
    if prefect == mlflow:
        mend = "both keep a table `alembic_version`: name two databases"
        raise UserError(f"Prefect and MLflow cannot share the database `{prefect}`", where="--mlflow-database", mend=mend)
    url = _url(address)
    try:
        import psycopg2
    except ImportError as error:
        mend = "pip install --constraint constraints.txt --editable '.[postgres]'"
        raise UserError("the driver psycopg2 is not installed", where=_OPTION, mend=mend) from error
    try:
        _make_missing(url, prefect, mlflow)
        _demand_own(url, prefect, "MLflow")
        _demand_own(url, mlflow, "Prefect")
    except psycopg2.Error as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        mend = "is it running? its password belongs into PGPASSWORD or ~/.pgpass"
        raise UserError(f"PostgreSQL cannot be used ({said[0]})", where=_OPTION, mend=mend) from error
    places = {
        driver: url.set(drivername=driver, database=name).render_as_string()
        for driver, name in (("postgresql+asyncpg", prefect), ("postgresql", mlflow))
    }
    return Databases("postgresql", places["postgresql+asyncpg"], places["postgresql"])


def _url(address: str) -> Any:
    """The address, taken apart. What is wrong with it is said without showing it: there may be a password in it."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(address)
        backend = url.get_backend_name()
    except (ArgumentError, ValueError) as error:
        raise UserError("that is no address of a PostgreSQL server", where=_OPTION, mend=_EXAMPLE) from error
    if backend != "postgresql":
        raise UserError(f"`{backend}` is not PostgreSQL", where=_OPTION, mend=_EXAMPLE)
    if url.password is not None:
        mend = "leave it out and set PGPASSWORD, or write ~/.pgpass; choose a new one, for others may have read it"
        raise UserError("a password in an address can be read by everybody on this machine", where=_OPTION, mend=mend)
    if url.query:
        mend = "use libpq's variables, such as PGSSLMODE or PGHOST"
        raise UserError("the address takes no `?` settings", where=_OPTION, mend=mend)
    return url


def _connect(url: Any, database: str) -> Any:
    import psycopg2

    connection = psycopg2.connect(host=url.host, port=url.port, user=url.username, dbname=database, connect_timeout=10)
    connection.autocommit = True  # databases are not made within a transaction
    return contextlib.closing(connection)


def _make_missing(url: Any, *names: str) -> None:
    from psycopg2 import sql

    with _connect(url, url.database or "postgres") as connection, connection.cursor() as cursor:
        for name in names:
            cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,))
            if cursor.fetchone() is None:
                make = sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8'")
                cursor.execute(make.format(sql.Identifier(name)))


def _demand_own(url: Any, database: str, stranger: str) -> None:
    with _connect(url, database) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT to_regclass(%s)", (_OWN_TABLES[stranger],))
        if cursor.fetchone() != (None,):
            option = "--prefect-database" if stranger == "MLflow" else "--mlflow-database"
            raise UserError(f"`{database}` is a database of {stranger}", where=option, mend="name another one")
