"""Which GPUs of this machine stages that run side by side have: each its own, so that none is loaded twice."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

from stages.contract.config import Compute
from stages.runtime.platform import NVIDIA_GPUS

VARIABLE = "CUDA_VISIBLE_DEVICES"
DRIVER = NVIDIA_GPUS


def visible() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    if (text := os.environ.get(VARIABLE)) is not None:
        return [name.strip() for name in text.split(",") if name.strip() and name.strip() != "-1"]
    return [str(number) for number in range(len(list(DRIVER.glob("*"))))]


class Devices:
    """Hands out GPUs to stages that run side by side; with `parallel` of 1, or without GPUs, everything is left as it is."""

    def __init__(self, parallel: int) -> None:
        self._free = visible() if parallel > 1 else []
        self._all, self._lock = len(self._free), threading.Lock()

    @contextlib.contextmanager
    def take(self, compute: Compute, pause: Callable[[float], None]) -> Iterator[dict[str, str]]:
        """Hold a GPU for each process of a stage; gives the variables for its environment.

        Waits until enough are free; `pause` sleeps so many seconds and may raise. A stage that wants more than there are gets
        all of them, and says itself what is wrong.
        """
        count = min(compute.processes, self._all)
        if count == 0 or compute.device == "cpu":
            yield {}
            return
        while (taken := self._try(count)) is None:
            pause(1.0)
        try:
            yield {VARIABLE: ",".join(taken)}
        finally:
            with self._lock:
                self._free += taken

    def _try(self, count: int) -> list[str] | None:
        with self._lock:
            if len(self._free) < count:
                return None
            taken, self._free = self._free[:count], self._free[count:]
            return taken
