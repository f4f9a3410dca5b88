"""Building the kernels: all C++ of this folder in one library, by the machine's own compiler, when it is first wanted.

That takes some seconds. The library is kept in the user's cache folder, under a name that says what it was made from and for
which processor.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from stages.runtime.platform import processor_identity
from stages.store.files import sync_file

SOURCES = Path(__file__).parent
FLAGS: tuple[str, ...] = ("-std=gnu++17", "-O3", "-ffp-contract=off", "-shared", "-fPIC")
TUNING = ("-march=native", "-mcpu=native")
"""The first that the compiler accepts: code for this processor. Apple's clang for arm64 has the second alone."""
OPENMP = "-fopenmp"
"""Used where the compiler has it (Apple's has not); without it the kernels run on one thread."""
TUNING_PROBE = "int probe() { return 0; }\n"
OPENMP_PROBE = "#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n"
Pointer, Number = ctypes.c_void_p, ctypes.c_int64


class NoCompiler(Exception):
    """The kernels could not be built; says why."""


def fields(numbers: Iterable[str] = (), floats: Iterable[str] = (), pointers: Iterable[str] = ()) -> list[tuple[str, Any]]:
    """Fields of a structure that a kernel is given: whole numbers, then floats, then pointers."""
    kinds: tuple[tuple[Iterable[str], Any], ...] = ((numbers, Number), (floats, ctypes.c_float), (pointers, Pointer))
    return [(name, kind) for names, kind in kinds for name in names]


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first that is found."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


@functools.cache
def built() -> ctypes.CDLL:
    """The library, built if need be.

    Raises NoCompiler.
    """
    command = compiler()
    if command is None:
        raise NoCompiler("no C++ compiler is installed")
    units, headers = (sorted(SOURCES.glob(pattern)) for pattern in ("*.cpp", "*.h"))
    texts = [path.read_text(encoding="utf-8") for path in (*units, *headers)]
    known = [*texts, *FLAGS, *TUNING, OPENMP, command, _said([command, "--version"]), processor_identity()]
    name = hashlib.sha256("\0".join(known).encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "r1-pipeline"
        library, digest = folder / f"kernels-{name}.so", folder / f"kernels-{name}.sha256"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):  # ranks come at once
            if not _is_whole(library, digest):
                fresh = library.with_suffix(f".{os.getpid()}")
                _said([command, *FLAGS, *_accepted_flags(command), *map(str, units), "-o", str(fresh)])
                sync_file(fresh)
                digest.write_bytes(_digest(fresh))
                fresh.replace(library)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise NoCompiler(str(error)) from error


def features() -> list[str]:
    """What was built in: `AVX`, `FMA`, `NEON` (else plain code), `OpenMP`. Raises NoCompiler."""
    library = built()
    library.kernel_features.restype = ctypes.c_char_p
    return str(library.kernel_features().decode()).split()


def _is_whole(library: Path, digest: Path) -> bool:
    """Whether a library is as it was built: a full disk or a lost power supply leaves one that is empty or cut off."""
    try:
        return digest.read_bytes() == _digest(library)
    except FileNotFoundError:
        return False


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def _accepted_flags(command: str) -> list[str]:
    """Those of TUNING and OPENMP with which the compiler makes a library."""
    tuning = next((flag for flag in TUNING if _accepts(command, flag, TUNING_PROBE)), None)
    openmp = OPENMP if _accepts(command, OPENMP, OPENMP_PROBE) else None
    return [flag for flag in (tuning, openmp) if flag is not None]


def _accepts(command: str, flag: str, source: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.cpp"
        path.write_text(source, encoding="ascii")
        arguments = [command, *FLAGS, flag, str(path), "-o", str(path.with_suffix(".so"))]
        return subprocess.run(arguments, capture_output=True, check=False).returncode == 0


def _said(command: list[str]) -> str:
    """What a command prints. Raises NoCompiler."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise NoCompiler(f"`{' '.join(command[:1])}` ended with status {done.returncode}: {lines[0] if lines else ''}")
    return done.stdout
