"""Building the kernels: all C++ of this folder in one library, by the machine's own compiler, when it is first wanted.

That takes some seconds. The library is kept in the user's cache folder, under a name that says what it was made from and for
which processor.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")
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
    known = [*texts, *FLAGS, command, _said([command, "--version"]), _processor()]
    name = hashlib.sha256("\0".join(known).encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "r1-pipeline"
        library = folder / f"kernels-{name}.so"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):  # ranks come at once
            if not library.exists():
                fresh = library.with_suffix(f".{os.getpid()}")
                _said([command, *FLAGS, *map(str, units), "-o", str(fresh)])
                fresh.replace(library)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise NoCompiler(str(error)) from error


def _said(command: list[str]) -> str:
    """What a command prints. Raises NoCompiler."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise NoCompiler(f"`{' '.join(command[:1])}` ended with status {done.returncode}: {lines[0] if lines else ''}")
    return done.stdout


def _processor() -> str:
    """What the code is made for: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features", "CPU part"))}))
