"""GPUs of this machine, by the driver's own program: importing torch for it takes seconds."""

import functools
import re
import shutil
import subprocess
from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class LocalGpu:
    """One of them."""

    name: str
    memory: float
    """Bytes."""


@functools.cache
def local_gpus() -> tuple[LocalGpu, ...]:
    """The GPUs that PyTorch would use: none without a driver, or with a build of PyTorch for CPUs.

    `CUDA_VISIBLE_DEVICES` counts.
    """
    import importlib.metadata
    import os

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        for_cpus = importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        for_cpus = True
    if visible in ("", "-1") or for_cpus or shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    gpus = [_gpu(line) for line in done.stdout.splitlines() if "," in line]
    count = len(gpus) if visible is None else len([part for part in visible.split(",") if part.strip()])
    return tuple(gpus[:count])


def _gpu(line: str) -> LocalGpu:
    name, _, memory = line.rpartition(",")
    return LocalGpu(name.strip(), float(memory) * MIB if re.fullmatch(r"\s*[0-9]+\s*", memory) else 0.0)
