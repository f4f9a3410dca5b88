"""Who may reach the servers of `r1 up`: this machine alone, or others too, and then only with a user name and password.

The credentials are the variables that clients use (`r1 run`, `prefect`, MLflow's own), so one set serves both sides:
PREFECT_API_AUTH_STRING=user:password, MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD. They reach the servers in their
environment alone. Neither server speaks TLS: see the README.
"""

import base64
import http
import importlib.util
import ipaddress
import os
import secrets
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flows.servers.databases import Databases
from stages.contract.errors import StageFailed, UserError
from stages.store.files import write_bytes

LOOPBACK = "127.0.0.1"
SHORTEST = 12
"""Characters that MLflow asks of a password."""
_WANTED = "export PREFECT_API_AUTH_STRING=user:password MLFLOW_TRACKING_USERNAME=user MLFLOW_TRACKING_PASSWORD=password"
_PREFECT_SECRETS = ("PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING")
_MLFLOW_SECRETS = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_AUTH_ADMIN_PASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
)


@dataclass(frozen=True)
class Access:
    """The address that is listened on, the names it may be called by, and the credentials that are asked for, if any."""

    host: str
    names: tuple[str, ...] = ()
    """Besides those of loopback."""
    prefect: str | None = field(default=None, repr=False)
    """`user:password`; None: nobody is asked."""
    mlflow: str | None = field(default=None, repr=False)

    def local(self, port: int) -> str:
        """Where this machine finds a server."""
        everywhere = {"0.0.0.0": LOOPBACK, "::": "::1"}  # noqa: S104 - looked up, not bound
        return f"http://{_bracketed(everywhere.get(self.host, self.host))}:{port}"

    def origins(self, port: int) -> list[str]:
        """Addresses of pages from which a browser may use a server: its own."""
        own = [_bracketed(name) for name in self.names]
        return [f"http://{name}:{port}" for name in (LOOPBACK, "localhost", *own)] + [f"https://{name}" for name in own]

    def prefect_environment(self, inherited: Mapping[str, str], port: int) -> dict[str, str]:
        """The environment of the Prefect server, without MLflow's secrets."""
        # Its pages ask the server that they come from, by whatever name it was reached.
        own = {"PREFECT_UI_API_URL": "/api", "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(self.origins(port))}
        if self.prefect is not None:
            own["PREFECT_SERVER_API_AUTH_STRING"] = self.prefect
        return {**{k: v for k, v in inherited.items() if k not in _MLFLOW_SECRETS}, **own}

    def mlflow_environment(self, inherited: Mapping[str, str], port: int, databases: Databases, folder: Path) -> dict[str, str]:
        """The environment of the MLflow server, without Prefect's secrets; a settings file for it is written into `folder`."""
        own = {k: v for k, v in inherited.items() if k not in (*_PREFECT_SECRETS, *_MLFLOW_SECRETS)}
        if self.names:
            hosts = [_bracketed(name) for name in (LOOPBACK, "localhost", *self.names)]
            own["MLFLOW_SERVER_ALLOWED_HOSTS"] = ",".join([*hosts, *(f"{name}:{port}" for name in hosts)])
            own["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] = ",".join(self.origins(port))
        if self.mlflow is None:
            return own
        users = databases.mlflow if databases.store == "postgresql" else f"sqlite:///{folder.parent / 'mlflow-users.db'}"
        settings = folder / "mlflow-auth.ini"
        text = f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {users.replace('%', '%%')}\n"
        write_bytes(settings, text.encode())
        name, _, password = self.mlflow.partition(":")
        return own | {
            "MLFLOW_AUTH_CONFIG_PATH": str(settings),
            "MLFLOW_AUTH_ADMIN_USERNAME": name,
            "MLFLOW_AUTH_ADMIN_PASSWORD": password,
            # It signs a form; who wants several servers behind one name sets one for all.
            "MLFLOW_FLASK_SERVER_SECRET_KEY": inherited.get("MLFLOW_FLASK_SERVER_SECRET_KEY") or secrets.token_hex(32),
        }

    def verify(self, prefect: str, mlflow: str) -> None:
        """Ask both servers, without the credentials and with them.

        Raises StageFailed when one answers everybody, UserError when it knows other credentials.
        """
        questions = (
            ("Prefect", f"{prefect}/api/admin/version", self.prefect, "PREFECT_API_AUTH_STRING"),
            ("MLflow", f"{mlflow}/api/2.0/mlflow/users/current", self.mlflow, "MLFLOW_TRACKING_PASSWORD"),
        )
        for what, question, login, variable in questions:
            if login is None:
                continue
            if (status := _status(question, None)) != http.HTTPStatus.UNAUTHORIZED:
                raise StageFailed(f"the {what} server does not ask for credentials (status {status}), so it is stopped")
            if (status := _status(question, login)) == http.HTTPStatus.UNAUTHORIZED:
                mend = "MLflow keeps the password of its first start: use that one, or change it through MLflow's users API"
                raise UserError(f"the {what} server does not take these credentials", where=variable, mend=mend)
            if status != http.HTTPStatus.OK:
                raise StageFailed(f"the {what} server answers with status {status}, so it is stopped")


def access(host: str, names: str | None, *, asked: bool, environment: Mapping[str, str] = os.environ) -> Access:
    """Who may reach servers that listen on `host`, by which `names` (separated by commas).

    `asked`: credentials are wanted on loopback too. Raises UserError when they are wanted and missing.
    """
    opened = not _is_loopback(host)
    known = _names(host, names) if opened or names else ()
    if not (opened or asked):
        return Access(host, known)
    why = f"servers on {host} can be reached by others, so they need credentials" if opened else "--auth needs credentials"
    prefect = environment.get("PREFECT_SERVER_API_AUTH_STRING") or environment.get("PREFECT_API_AUTH_STRING") or ""
    name, password = (environment.get(f"MLFLOW_TRACKING_{part}") or "" for part in ("USERNAME", "PASSWORD"))
    if not prefect or not name or not password:
        raise UserError(why, where="--host" if opened else "--auth", mend=_WANTED)
    if not all(prefect.partition(":")) or not prefect.isascii():
        raise UserError("it must be user:password, in ASCII", where="PREFECT_API_AUTH_STRING", mend=_WANTED)
    if ":" in name or len(password) < SHORTEST:
        mend = f"a name without `:`, a password of at least {SHORTEST} characters"
        raise UserError("MLflow does not take these credentials", where="MLFLOW_TRACKING_PASSWORD", mend=mend)
    if importlib.util.find_spec("flask_wtf") is None:
        mend = "pip install --constraint constraints.txt --editable '.[auth]'"
        raise UserError("MLflow's users need Flask-WTF, which is not installed", where="--auth", mend=mend)
    return Access(host, known, prefect, f"{name}:{password}")


def _names(host: str, names: str | None) -> tuple[str, ...]:
    given = [name.strip() for name in (names or "").split(",") if name.strip()]
    if any("*" in name for name in given):
        mend = "name those by which the servers are reached"
        raise UserError("a `*` would let every name through", where="--allowed-hosts", mend=mend)
    if not given:
        given = [socket.gethostname()]
    try:
        specific = not ipaddress.ip_address(host).is_unspecified
    except ValueError:
        specific = True
    return tuple(dict.fromkeys([*given, *([host] if specific else [])]))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bracketed(name: str) -> str:
    return f"[{name}]" if name.count(":") > 1 and not name.startswith("[") else name


def _status(address: str, login: str | None) -> int:
    """Status of an answer; 0 when there is none."""
    request = urllib.request.Request(address)  # noqa: S310 - always an http address of ours
    if login is not None:
        request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
