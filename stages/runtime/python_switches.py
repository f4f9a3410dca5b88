"""Environment variables that switch Python itself to a mode in which the libraries, or this command, do not work.

`PYTHONOPTIMIZE=2` strips the docstrings from which transformers and MLflow build classes, `PYTHONWARNINGS=error` makes an
exception of any library's deprecation warning, `PYTHONINSPECT` turns every exit status into 1, and the others flood the logs.
"""

import os
import sys

from stages.contract.errors import UserError

SWITCHES = ("PYTHONOPTIMIZE", "PYTHONWARNINGS", "PYTHONINSPECT", "PYTHONDEVMODE", "PYTHONVERBOSE", "PYTHONPROFILEIMPORTTIME")
"""Variables without which this process and its children run."""


def restart_without_switches() -> None:
    """Start this process again without the switches, when there are any: Python reads them at its start alone."""
    if [name for name in SWITCHES if os.environ.pop(name, None)]:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - the same program, as it was started


def demand_docstrings() -> None:
    """Raise UserError when Python was started with -OO."""
    if sys.flags.optimize > 1:
        raise UserError(
            "without docstrings transformers and MLflow do not work", where="python -OO", mend="start it without -OO"
        )
