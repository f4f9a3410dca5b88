"""SQLite databases of Prefect and MLflow with all their tables and no rows, one for each version of either package.

In a new runs folder both make their tables by going through all migrations they ever had: 6 and 2 s of computing for the same
result. `make setup` does it once and keeps the results in the environment (`python -m stages.store.empty_databases`); a runs
folder gets a copy. Without these files all is the same, and slower.
"""

import contextlib
import importlib.metadata
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Literal

from stages.store.user_code import child_environment

Package = Literal["prefect", "mlflow"]

_COMMANDS = {
    "prefect": ["-m", "prefect", "--no-prompt", "server", "database", "upgrade", "--yes"],
    "mlflow": ["-c", "from mlflow import MlflowClient; MlflowClient('sqlite:///mlflow.db').search_experiments(max_results=1)"],
}
"""Make `PACKAGE.db` in the working directory, which is also Prefect's home."""
_ROWS = {"prefect": (), "mlflow": ("experiments",)}
"""Tables whose rows hold the folder that they were made in; MLflow makes its default experiment again."""


def template(package: Package) -> Path:
    """Where the empty database of the installed version is, beside the environment's packages."""
    return Path(sys.prefix) / "share" / "r1-pipeline" / f"{package}-{importlib.metadata.version(package)}.db"


def place(package: Package, database: Path) -> bool:
    """Copy the empty database to where there is none yet; whether it was copied.

    Of two processes that do it at once, one does; what a disk refuses here is said by the package that opens the database.
    """
    if database.exists():
        return False
    part = database.with_name(f".{database.name}.{uuid.uuid4().hex}")
    try:
        shutil.copyfile(template(package), part)
        os.link(part, database)  # unlike a rename it never replaces what another process has made meanwhile
    except (OSError, importlib.metadata.PackageNotFoundError):  # the latter: mlflow-skinny in place of mlflow
        return False
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return True


def make(package: Package, folder: Path) -> Path:
    """Make an empty database by the package's own migrations; returns `folder / PACKAGE.db`, one file without a log beside it.

    Raises CalledProcessError when the package cannot.
    """
    made = folder / f"{package}.db"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        # Settings and databases of the user stay out of it: variables, profiles, and files of the working directory.
        variables = {k: v for k, v in child_environment().items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
        variables |= {"PREFECT_HOME": work, "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        variables |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"}
        command = [sys.executable, *_COMMANDS[package]]
        subprocess.run(command, cwd=work, env=variables, capture_output=True, check=True, stdin=subprocess.DEVNULL)
        with contextlib.closing(sqlite3.connect(f"{work}/{package}.db")) as connection:
            for table in _ROWS[package]:
                connection.execute(f"DELETE FROM {table}")  # noqa: S608 - a name from above
            connection.commit()
            connection.execute("VACUUM INTO ?", (str(made),))
    return made


def main() -> None:
    """Make what the environment does not have yet."""
    packages: tuple[Package, ...] = ("prefect", "mlflow")
    for package in packages:
        goal = template(package)
        if not goal.is_file():
            goal.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=goal.parent) as folder:
                try:
                    make(package, Path(folder)).replace(goal)
                except subprocess.CalledProcessError as error:
                    reason = (error.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
                    sys.exit(f"set-up: {package} cannot make its database ({reason})")


if __name__ == "__main__":
    main()
