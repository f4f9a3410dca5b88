"""A PostgreSQL server of a test's own, on loopback, with a password; needs Debian's package postgresql."""

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flows.servers.server_process import free_port
from tests.requirements import require

USER = "r1_owner"


@dataclass(frozen=True)
class Postgres:
    """A running server. `variables`: what a client needs in its environment."""

    port: int
    password: str
    log: Path
    bin: Path

    @property
    def address(self) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/"

    @property
    def variables(self) -> dict[str, str]:
        return {"PGPASSWORD": self.password}

    def ask(self, database: str, question: str) -> list[str]:
        """The lines that psql answers."""
        place = ["--host", "127.0.0.1", "--port", str(self.port), "--username", USER, "--dbname", database]
        command = [str(self.bin / "psql"), "--no-psqlrc", "--tuples-only", "--no-align", *place, "--command", question]
        done = subprocess.run(command, env={**os.environ, **self.variables}, capture_output=True, text=True, check=True)
        return done.stdout.split()


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Start one, on an empty cluster, and end it. The test is skipped where PostgreSQL is not installed."""
    require("postgresql")
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda place: float(place.parent.name))
    folder = Path(tempfile.mkdtemp(prefix="r1-postgres-"))
    own: dict[str, object] = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = pwd.getpwnam("postgres")
        os.chown(folder, user.pw_uid, user.pw_gid)
        own = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    running = Postgres(free_port(), secrets.token_hex(16), folder / "log", places[-1])
    process = None
    try:
        secret = folder / "password"
        secret.write_text(running.password)
        secret.chmod(0o644)  # for the server's user; the folder is for him alone
        make = [running.bin / "initdb", "--pgdata", folder / "data", "--username", USER, "--pwfile", secret]
        make += ["--auth", "scram-sha-256", "--encoding", "UTF8", "--no-sync"]
        subprocess.run([*map(str, make)], cwd="/", capture_output=True, check=True, **own)  # type: ignore[call-overload]
        options = {"listen_addresses": "127.0.0.1", "port": running.port, "unix_socket_directories": folder, "fsync": "off"}
        command = [running.bin / "postgres", "-D", folder / "data", *(f"--{k}={v}" for k, v in options.items())]
        with running.log.open("wb") as log:
            process = subprocess.Popen([*map(str, command)], cwd="/", stdout=log, stderr=log, **own)  # type: ignore[call-overload]
        ready = [running.bin / "pg_isready", "--host", "127.0.0.1", "--port", running.port, "--timeout", 60]
        for _ in range(100):
            if subprocess.run([*map(str, ready)], capture_output=True, check=False).returncode == 0:
                break
            assert process.poll() is None, running.log.read_text()
        yield running
    finally:
        if process is not None:
            process.send_signal(signal.SIGINT)
            process.wait(30)
        shutil.rmtree(folder)
