"""What was looked at before anything is computed, and how it is shown."""

from dataclasses import dataclass
from typing import Literal

from stages.contract.errors import UserError

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    check: str
    state: State
    found: str
    mend: str = ""
    where: str = ""
    """File and key, where a mistake stands in one."""
    about: Literal["machine", "recipe"] = "machine"
    """`recipe`: a mistake in the recipe, its data or its code, on whatever machine it runs."""

    def error(self) -> UserError:
        """The finding as the line that ends a command."""
        return UserError(self.found, where=self.where or self.check, mend=self.mend)


def show(findings: list[Finding]) -> None:
    """Print one line for each."""
    width = max((len(finding.check) for finding in findings), default=0)
    print("\n".join(line_of(finding, width) for finding in findings))


def line_of(finding: Finding, width: int = 0) -> str:
    """One line; `width`: characters of the column with the names of checks."""
    where = f"{finding.where}: " if finding.where else ""
    mend = f"; {finding.mend}" if finding.mend else ""
    return f"{finding.state:<4}  {finding.check:<{width}}  {where}{finding.found}{mend}"


def mistake(check: str, error: UserError, where: str = "") -> Finding:
    """A failed check of the recipe. `where`: the recipe's key; that of the error is kept beside it."""
    what = f"{error.where}: {error.what}" if where and error.where else error.what
    return Finding(check, "fail", what, error.mend, where or error.where, "recipe")
