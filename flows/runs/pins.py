"""Runs and stage folders that `r1 gc` leaves alone. A pin is a file in the folder itself: it is copied and moved with it."""

from pathlib import Path

PIN = ".pinned"
"""Name of the file."""


def pinned(folder: Path) -> bool:
    """Whether the folder of a run or stage is pinned."""
    return (folder / PIN).exists()
