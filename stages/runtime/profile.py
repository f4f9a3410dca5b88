"""A trace of what is inside: every operation with its time, for chrome://tracing or https://ui.perfetto.dev."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from torch.profiler import profile


@contextlib.contextmanager
def traced(file: Path | None) -> Iterator[None]:
    """Write a trace to `file`; without one, nothing is recorded."""
    if file is None:
        yield
        return
    with profile() as recorded:
        yield
    recorded.export_chrome_trace(str(file))
