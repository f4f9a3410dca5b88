"""What an input is: how it is made, which of its files can be damaged how, and how it is read for real."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.damage import Damage

Kinds = tuple[Callable[[bytes], Damage], ...]
Read = tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class Input:
    """One kind of input."""

    make: Callable[[Path], None]
    load: Callable[[Path], Read]
    files: dict[str, Kinds]
    """Pattern of files -> how they can be damaged."""
    whole: bool = True
    """Whether files may also be missing, become folders, or be joined by others."""
    cost: float = 1.0
    """Share of the usual number of cases, for what is slow to read."""
