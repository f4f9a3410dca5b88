"""`r1 pin` and `r1 unpin`: runs and stage folders that `r1 gc` leaves alone, whatever it is asked for.

A pin is a file in the folder itself, so it is copied and moved with it.
"""

import argparse
import datetime as dt
from pathlib import Path
from typing import Any

from flows.cli.run import Answer, runs_of
from flows.runs.pins import PIN, pinned
from stages.contract.errors import ExitStatus, UserError
from stages.store.files import write_json
from stages.store.folders import Runs


def pin(options: argparse.Namespace) -> Answer:
    """`r1 pin`; without a name it lists the pins."""
    runs = runs_of(options)
    if options.name is None:
        names = [path.name for path in _all(runs) if pinned(path)]
        if not options.json:
            print("\n".join(names) or "nothing is pinned")
        return ExitStatus.DONE, {"pinned": names}
    folder = _named(runs, options.name)
    write_json(folder / PIN, {"since": dt.datetime.now(dt.UTC).isoformat(timespec="seconds")})
    return _said(folder, options, is_pinned=True)


def unpin(options: argparse.Namespace) -> Answer:
    """`r1 unpin`."""
    folder = _named(runs_of(options), options.name)
    if not pinned(folder):
        raise UserError("it is not pinned", where=folder.name, mend="`r1 pin` lists the pins")
    (folder / PIN).unlink()
    return _said(folder, options, is_pinned=False)


def _said(folder: Path, options: argparse.Namespace, *, is_pinned: bool) -> Answer:
    if not options.json:
        print(f"{folder.name} is {'pinned: `r1 gc` leaves it' if is_pinned else 'no longer pinned'}")
    document: dict[str, Any] = {"folder": str(folder), "pinned": is_pinned}
    return ExitStatus.DONE, document


def _all(runs: Runs) -> list[Path]:
    return sorted(path for kind in ("pipelines", "stages") for path in (runs.path / kind).glob("[!.]*") if path.is_dir())


def _named(runs: Runs, name: str) -> Path:
    """The folder of the stage or run of that name or path (or `latest`).

    Raises UserError when there is none.
    """
    stage = runs.path / "stages" / Path(name).name
    if Path(name).name and stage.is_dir() and (name == stage.name or Path(name).resolve() == stage.resolve()):
        return stage
    return runs.pipeline(name).path
