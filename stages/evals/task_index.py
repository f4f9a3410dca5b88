"""Names of lm-eval's built-in tasks, without waiting for lm-eval: it reads 14,000 YAML files (11 to 18 s) to know them.

`make setup` writes them into the environment once per version of lm-eval (`python -m stages.evals.task_index`). Where the file
is missing it is written when names are first asked for; where it cannot be written they are collected each time.
"""

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from stages.contract.errors import UserError
from stages.store.files import read_json, write_json
from stages.store.user_code import child_environment

SECONDS = 300.0
"""What collecting the names may take on a busy machine."""


def index_file() -> Path:
    """Where the names of the installed version are, beside the environment's packages."""
    version = importlib.metadata.version("lm_eval")
    return Path(sys.prefix) / "share" / "r1-pipeline" / f"lm-eval-tasks-{version}.json"


def builtin_tasks(note: Callable[[str], None] = lambda _: None) -> frozenset[str]:
    """Names of all built-in tasks, groups and tags.

    `note` gets a line where they have to be collected first. Raises UserError when lm-eval cannot be imported.
    """
    file = index_file()
    try:
        return frozenset(map(str, read_json(file)))
    except (OSError, ValueError, TypeError):  # missing, or damaged: it is made again
        note("collecting the names of lm-eval's tasks: 15 s or more, once (`make setup` does it beforehand)")
    names = _collected()
    try:
        write_json(file, sorted(names))
    except OSError:
        note(f"{file} cannot be written, so they will be collected again next time")
    return names


def _collected() -> frozenset[str]:
    """In a process of its own: lm-eval's imports are not wanted here."""
    command = [sys.executable, "-m", "stages.evals.task_index", "-"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, check=False, env=child_environment(), stdin=subprocess.DEVNULL
    )
    if done.returncode:
        what = f"lm-eval cannot list its tasks ({(done.stderr.strip().splitlines() or ['no reason given'])[-1]})"
        raise UserError(what, where="lm_eval", mend="run `make setup`")
    return frozenset(json.loads(done.stdout.splitlines()[-1]))


def main(arguments: list[str]) -> None:
    """Collect the names: onto standard output (`-`), else into `index_file`, unless it is there."""
    if not arguments and index_file().is_file():
        return
    from lm_eval.tasks import TaskManager

    names = sorted(map(str, TaskManager().task_index))
    if arguments:
        print(json.dumps(names))
    else:
        write_json(index_file(), names)


if __name__ == "__main__":
    main(sys.argv[1:])
