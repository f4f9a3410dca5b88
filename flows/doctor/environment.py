"""`r1 doctor`: what works on this machine, line by line, and how to mend what doesn't."""

import importlib.metadata
import shutil
import sys
from collections.abc import Iterator

import psutil
from packaging.version import Version

from flows.doctor.finding import Finding
from stages.contract.errors import UserError
from stages.runtime.platform import usable_cores
from stages.store.folders import Runs

_GIB = 1 << 30


def examine(runs: Runs) -> list[Finding]:
    """Look at everything. Nothing is changed except that the runs folder is made."""
    return [_python(), *_machine(), *_torch(), _compiler(), _runs(runs), *package_versions()]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    return Finding("python", "ok" if good else "fail", version, "" if good else "use Python 3.11 or later")


def _machine() -> Iterator[Finding]:
    count, memory = usable_cores(), psutil.virtual_memory()
    yield Finding("cores", "ok" if count >= 2 else "warn", str(count), "" if count >= 2 else "expect twice the time")
    free = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"
    enough = memory.available >= 4 * _GIB
    yield Finding("memory", "ok" if enough else "warn", free, "" if enough else "SmolLM2-135M needs about 4 GiB")


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", "fail", f"cannot be imported ({error})", "run `make setup`")
        return
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        found = f"{torch.__version__}, {torch.cuda.device_count()} × {', '.join(sorted(names))}"
    else:
        found = f"{torch.__version__}, CPU"
    yield Finding("torch", "ok", found)
    capabilities = torch.cpu.get_capabilities()
    if torch.cuda.is_available() or capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
        yield Finding("bfloat16", "ok", "in hardware")
    else:
        yield Finding("bfloat16", "warn", "hundreds of times slower than float32 on this CPU", "keep `dtype: float32`")


def _compiler() -> Finding:
    """On a CPU sampling and attention are compiled."""
    from stages.kernels.build import NoCompiler, compiler, features

    try:
        built_with = features()
    except NoCompiler as error:
        slower = f"{error}: sampling on a CPU takes 1.5 to 3 times as long, training a little longer"
        return Finding("C++ compiler", "warn", slower, "Debian: apt-get install g++; macOS: xcode-select --install")
    built = f"{compiler()}: sampling and attention on this CPU are compiled ({', '.join(built_with) or 'plain code'})"
    if "OpenMP" in built_with:
        return Finding("C++ compiler", "ok", built)
    return Finding("C++ compiler", "warn", f"{built}, without OpenMP on one thread", "name one that has it: export CXX=g++-14")


def _runs(runs: Runs) -> Finding:
    try:
        runs.prepare()
    except UserError as error:
        return Finding("runs folder", "fail", f"{runs.path}: {error.what}", error.mend)
    free = shutil.disk_usage(runs.path).free / _GIB
    enough = free >= 10
    found = f"{runs.path}, {free:.0f} GiB free"
    return Finding("runs folder", "ok" if enough else "warn", found, "" if enough else "checkpoints of larger models need more")


def package_versions() -> Iterator[Finding]:
    """Whether the packages that every run imports are there, in versions that work together."""
    for name in ("prefect", "mlflow", "deepspeed", "transformers", "lm_eval"):
        version = _version(name)
        yield Finding(name, "ok" if version else "fail", version or "missing", "" if version else "run `make setup`")
    yield _bounded("fastapi", "0.139", "0.151", "Prefect's server refuses its own client with later ones")
    yield _bounded("sqlalchemy", "2.0", "2.1", "Prefect's scheduler plans nothing with later ones")


def _bounded(name: str, low: str, below: str, why: str) -> Finding:
    version = _version(name)
    good = version is not None and Version(low) <= Version(version) < Version(below)
    mend = "" if good else f"pip install '{name}>={low},<{below}': {why}"
    return Finding(name, "ok" if good else "fail", version or "missing", mend)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
