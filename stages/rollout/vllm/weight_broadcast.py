"""Weights from the trainer's memory into vLLM's without a file between: a group of two, over NCCL on GPUs and gloo on CPUs.

The trainer's rank is 0 of the group, its vLLM 1 (`_join` and `_receive` in worker.py). They find each other through a
file that is gone once they have. It is torch's own process group on both sides, apart from the trainer's: vLLM's engines for
this (nccl_engine.py in its package) would have to be imported by the trainer, whose environment cannot hold vLLM.
"""

import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Named = Sequence[tuple[str, Tensor]]


class WeightsGroup:
    """The trainer's end."""

    def __init__(self, device: torch.device, seconds: float, call: Callable[[Path], None]) -> None:
        """Meet the other end. `call` is given the file in which they meet and makes the other end join, without waiting.

        Raises RuntimeError when it does not within `seconds`, or later when it is gone.
        """
        self._device = device
        with tempfile.TemporaryDirectory(prefix="r1-weights-") as folder:
            meeting = Path(folder) / "group"
            call(meeting)
            store = dist.FileStore(str(meeting), 2)  # type: ignore[attr-defined]
            self._group = _group(store, device.type, timedelta(seconds=seconds))
            self._send(torch.zeros(1, device=device))  # NCCL connects at its first use

    def send(self, weights: Named) -> None:
        """Send every tensor whole, in this order; the other end knows names, types and shapes already."""
        for _, tensor in weights:
            self._send(tensor.detach().to(self._device).contiguous())

    def _send(self, tensor: Tensor) -> None:
        self._group.broadcast(tensor, 0).wait()


def _group(store: Any, device: str, timeout: timedelta) -> Any:
    if device != "cuda":
        return dist.ProcessGroupGloo(store, 0, 2, timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, 0, 2, options)


def described(weights: Named) -> list[list[Any]]:
    """Name, type and shape of each, as the other end is told."""
    return [[name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in weights]


def distinct(weights: Named) -> list[tuple[str, Tensor]]:
    """Without those that are another one's memory: a tied head's, which vLLM ties by itself."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    found = []
    for name, tensor in weights:
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key not in seen:
            found.append((name, tensor))
        seen.add(key)
    return found
