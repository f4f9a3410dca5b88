"""What went wrong in a user's function: the error, with the file and line of the user's own code."""

import json
import os
import sys
import sysconfig
import traceback
from dataclasses import dataclass
from pathlib import Path

_LIBRARIES = tuple({*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix})
_OURS = f"{Path(__file__).parents[2]}{os.sep}"


@dataclass(frozen=True)
class Fault:
    """An error and where the user's code raised it."""

    error: str
    """Type and message, on one line."""
    file: str = ""
    """Empty where no code of the user's took part (a module that does not exist)."""
    line: int = 0

    @property
    def place(self) -> str:
        """File and line, empty where there is none."""
        return f"{self.file}: line {self.line}" if self.file else ""

    def __str__(self) -> str:
        return f"{self.error}; {self.file}, line {self.line}" if self.file else self.error

    def as_json(self) -> str:
        """One line that `from_json` reads."""
        return json.dumps([self.error, self.file, self.line])

    @classmethod
    def from_json(cls, text: str) -> "Fault":
        """What `as_json` wrote; any other text is the error itself."""
        try:
            error, file, line = json.loads(text)
            return cls(str(error), str(file), int(line))
        except (ValueError, TypeError, RecursionError):
            return cls(text)


def fault_of(error: BaseException) -> Fault:
    """The fault that an exception tells: of a SyntaxError its place in the text, else the last line of code of the user's."""
    message = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())[:300]
    told = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return Fault(told, error.filename, error.lineno or 0)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(("<", _OURS, *_LIBRARIES))]
    return Fault(told, own[-1].filename, own[-1].lineno or 0) if own else Fault(told)
