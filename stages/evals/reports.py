"""Reading what evaluations reported."""

from pathlib import Path
from typing import Any

from stages.contract.errors import UserError
from stages.store.files import read_json


def read_report(path: Path) -> dict[str, Any]:
    """A JSON document of a report, such as `metrics.json` or `problems.json`. Raises UserError when it cannot be read."""
    try:
        document: dict[str, Any] = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError("not a readable report", where=str(path), mend="run its stage with --fresh") from error
    return document
