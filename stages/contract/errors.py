"""Errors that travel to the user, and the exit statuses they become.

`UserError` is for everything a user can cause and mend: it is printed as one line, never with a traceback.
"""

from enum import IntEnum

from stages.contract.secrets import redact


class ExitStatus(IntEnum):
    """Exit statuses of `r1` and of a stage's process (also kept in a stage's `outcome.json`)."""

    DONE = 0
    MISTAKE = 2
    """The user can mend it; never retried."""
    FAILED = 3
    """The stage failed; a retry may help."""
    STOPPED = 4
    """A gate stopped the run: all that ran is sound, a model is not as good as was asked for; never retried."""
    INTERRUPTED = 75
    """Stopped on request (SIGTERM, SIGINT); always resumable (EX_TEMPFAIL of sysexits.h)."""


RESUME = "r1 resume RUN"
"""How a stage, which does not know the run's name, says how to go on; whoever runs it puts the name in."""

LONGEST = 1000
"""Characters of each part of a line that people are to read; of what is longer the middle is left out."""


def _readable(text: str) -> str:
    """One line of printable characters without secrets: files and arguments may hold anything, and their names are quoted."""
    line = " ".join(redact(text).split())
    if not line.isprintable():
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 3 :]}"


class UserError(Exception):
    """What went wrong, where (file and key), and how to mend it.

    >>> str(UserError("unknown key `lrr`", where="a.yaml: stages.zero.lrr", mend="did you mean `lr`?"))
    'a.yaml: stages.zero.lrr: unknown key `lrr`; did you mean `lr`?'
    """

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        self.what, self.where, self.mend = map(_readable, (what, where, mend))
        super().__init__(self.what)

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}; {self.mend}" if self.mend else head


class Interrupted(Exception):
    """A stage stopped at a boundary because it was asked to; its newest checkpoint stands."""


class GateClosed(Exception):
    """A gate stopped the run: a model did not pass, and the recipe wants nothing after it to be computed."""


class StageFailed(Exception):
    """A stage's process tree ended without success; the message says which stage and where its log is."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))
