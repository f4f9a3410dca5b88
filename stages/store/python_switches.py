"""Environment variables that switch Python itself to a mode in which the libraries do not work, taken out of a run.

`PYTHONOPTIMIZE=2` strips the docstrings from which transformers and MLflow build classes, `PYTHONWARNINGS=error` makes an
exception of any library's deprecation warning, and the others print or wait where a process has to end.
"""

import os
import sys
import warnings

from stages.store.errors import UserError

SWITCHES = ("PYTHONOPTIMIZE", "PYTHONWARNINGS", "PYTHONINSPECT", "PYTHONDEVMODE", "PYTHONVERBOSE", "PYTHONPROFILEIMPORTTIME")
"""Variables that this process passes on to none of its children."""


def leave_switched_modes() -> None:
    """Take the switches out of the environment, and warnings back from being errors.

    Raises UserError when this process itself runs without docstrings, which nothing can bring back.
    """
    for name in SWITCHES:
        os.environ.pop(name, None)
    if any(entry[0] == "error" for entry in warnings.filters):
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):  # Python's defaults
            warnings.simplefilter("ignore", category)
    if sys.flags.optimize > 1:
        what = "Python runs without docstrings (-OO), which transformers and MLflow need"
        raise UserError(what, where="PYTHONOPTIMIZE", mend="unset it")
