"""What no run on this machine can do without, whatever its recipe: packages, memory, a temporary folder, loopback, a compiler.

Costs some milliseconds: nothing is imported, started or compiled.
"""

import socket
import sys
import tempfile
from collections.abc import Iterator

import psutil

from flows.doctor.environment import package_versions
from flows.doctor.finding import Finding
from flows.doctor.scope import Scope
from stages.kernels.build import compiler
from stages.runtime.platform import LOOPBACK, loopback_interface, memory_limit

GIB = 1 << 30
LEAST_MEMORY, ENOUGH_MEMORY = 1.0, 2.0
"""GiB. A stage of the toy holds 0.65, the command 0.25, Prefect's server 0.2, each verifier 0.06 (measured on Linux x86-64):
with less than the first number the system kills one of them."""


def examine_start(scope: Scope) -> Iterator[Finding]:
    """One finding after the other; none when nothing is to be computed."""
    if scope.stages:
        yield from (finding for finding in package_versions() if finding.state != "ok")
        yield _memory()
        yield _temporary_folder()
        yield _loopback()
        yield _compiler()


def _memory() -> Finding:
    free = min(psutil.virtual_memory().available, memory_limit() or sys.maxsize) / GIB
    available = f"{free:.1f} GiB are free"
    if free < LEAST_MEMORY:
        return Finding("memory", "fail", f"{available}, a run needs {LEAST_MEMORY:.0f} and more", "end other programs")
    mend = "" if free >= ENOUGH_MEMORY else f"a run is comfortable with {ENOUGH_MEMORY:.0f} GiB and more"
    return Finding("memory", "warn" if mend else "ok", available, mend)


def _temporary_folder() -> Finding:
    try:
        with tempfile.TemporaryFile():
            return Finding("temporary folder", "ok", tempfile.gettempdir())
    except OSError as error:
        what = f"no file can be written there ({error.strerror or error})"
        return Finding("temporary folder", "fail", what, "make room, or set TMPDIR to a folder of yours")


def _loopback() -> Finding:
    """The servers listen on loopback, and the ranks of a stage meet there."""
    mend = "bring loopback up (Linux: `ip link set lo up`)"
    if (interface := loopback_interface()) is None:
        return Finding("loopback", "fail", f"no network interface has the address {LOOPBACK}", mend)
    try:
        with socket.create_server((LOOPBACK, 0)):
            return Finding("loopback", "ok", interface)
    except OSError as error:
        return Finding("loopback", "fail", f"no port of {LOOPBACK} can be opened ({error.strerror or error})", mend)


def _compiler() -> Finding:
    """Without one everything works, slowly: a warning."""
    if (path := compiler()) is not None:
        return Finding("C++ compiler", "ok", path)
    mend = "Debian: apt-get install g++; macOS: xcode-select --install"
    return Finding("C++ compiler", "warn", "none: sampling on a CPU takes 1.5 to 3 times as long", mend)
