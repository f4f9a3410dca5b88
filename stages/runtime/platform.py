"""Every call that not every system has: cores, cgroups, /proc, shared memory, limits, locks, process groups, loopback.

Linux is the reference. Where a system lacks something, a function returns None (or False) and its docstring says what the
caller loses. A test keeps these calls out of all other modules.
"""

import functools
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

if sys.platform != "win32":
    import fcntl
    import resource

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - files there have names of their own
"""A file system in memory. macOS has none: what would go through it goes through the disk."""
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
"""A folder per GPU, where NVIDIA's driver for Linux is loaded."""
NVIDIA_VERSION = Path("/proc/driver/nvidia/version")
LOOPBACK = "127.0.0.1"
_START_TICKS = 22
"""Number of the field `starttime` in /proc/PID/stat, from 1."""


def refuse_native_windows() -> None:
    """End the program with one line and exit status 2 on native Windows, which has neither fork nor POSIX signals."""
    if sys.platform == "win32":
        hint = "use WSL2: `wsl --install`, then clone and `make setup` in its Linux"
        print(f"r1: platform: native Windows is not supported; {hint}", file=sys.stderr)
        raise SystemExit(2)


def is_linux() -> bool:
    """Whether features of Linux alone (bubblewrap, pidfd, seccomp) can be there."""
    return sys.platform == "linux"


def system_name() -> str:
    """Name of the operating system and architecture, for messages: `Linux x86_64`, `macOS arm64`."""
    return f"{'macOS' if sys.platform == 'darwin' else platform.system()} {platform.machine()}"


# Processors and memory


def usable_cores() -> int:
    """Number of cores this process may use: its affinity mask, capped by the CPU quota of its cgroup, rounded up."""
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def cpu_quota() -> float | None:
    """CPU seconds per second that the cgroups of this process grant; None without a limit or without cgroups."""
    quotas = []
    for folder in _cgroup_folders("cpu"):
        try:
            if (folder / "cpu.max").exists():
                limit, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            else:
                limit, period = ((folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period"))
            quotas.append(int(limit) / int(period))
        except (OSError, ValueError):  # not limited here: no such file, or "max"
            continue
    return min((quota for quota in quotas if quota > 0), default=None)  # version 1 writes -1 for no limit


def memory_limit() -> int | None:
    """Bytes of memory that the cgroups of this process grant; None without a limit or without cgroups."""
    limits = []
    for folder in _cgroup_folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                limits.append(int((folder / name).read_text(encoding="ascii")))
            except (OSError, ValueError):  # as above
                continue
    return min(limits, default=None)


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """Folders of this process's cgroup of one controller and of all above it; version 2 and version 1."""
    try:
        lines = (PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, names, path = line.split(":", 2)
        if number == "0" and not names:
            root = CGROUP
        elif controller in names.split(","):
            root = next((folder for name in (controller, names) if (folder := CGROUP / name).is_dir()), CGROUP / controller)
        else:
            continue
        inner = Path(path.lstrip("/"))
        yield from (root / part for part in (inner, *inner.parents))


@functools.cache
def processor_name() -> str:
    """The processor's model, such as `AMD EPYC 7763 64-Core Processor`; its architecture where the system does not tell."""
    for line in _cpuinfo():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or platform.machine()


def processor_features() -> frozenset[str] | None:
    """Names of its instruction sets as Linux spells them (`avx2`, `amx_bf16`; arm64: `asimd`, `bf16`); None without /proc."""
    lines = (line.partition(":") for line in _cpuinfo())
    features = [value.split() for name, _, value in lines if name.strip() in ("flags", "Features")]
    return frozenset(features[0]) if features else None


def processor_identity() -> str:
    """Text that differs between processors for which a compiler generates different code."""
    identifying = ("flags", "model name", "Features", "CPU part")
    lines = sorted({line for line in _cpuinfo() if line.startswith(identifying)})
    return "\n".join(lines) or f"{platform.machine()} {processor_name()}"


def _cpuinfo() -> list[str]:
    try:
        return (PROC / "cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


# Processes


def start_of_process(pid: int) -> str | None:
    """Boot id and clock ticks from boot to the start of a process; None on systems without /proc.

    Raises:
        ProcessLookupError: There is no such process.

    """
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        stat = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError as error:
        if (PROC / "self" / "stat").exists():
            raise ProcessLookupError(pid) from error
        return None
    # The second field is the program's name in parentheses, which may hold spaces and parentheses itself.
    return f"{boot} {stat.rpartition(')')[2].split()[_START_TICKS - 3]}"


def peak_memory() -> int | None:
    """Peak resident memory of this process in bytes; None without /proc.

    Not `getrusage`: there a process begins with what its parent held when it was started.
    """
    try:
        text = (PROC / "self" / "status").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^VmHWM:\s+([0-9]+) kB$", text, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None


def kill_group(leader: int, number: int) -> None:
    """Send a signal to a process group; nothing happens when it is gone."""
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        pass
    except PermissionError:
        if sys.platform != "darwin":  # macOS answers so for a group of which only zombies are left
            raise


class ProcessUsage(NamedTuple):
    """What /proc says of a process."""

    cpu_s: float
    threads: int
    resident: int
    """Bytes."""


def process_usage(pid: int) -> ProcessUsage:
    """Usage of any process. Linux only.

    Raises:
        FileNotFoundError, ProcessLookupError: There is no such process.

    """
    # From the state on: what stands before it is a name of the program's choice.
    fields = (PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    ticks, page = _units()
    return ProcessUsage((int(fields[11]) + int(fields[12])) / ticks, int(fields[17]), int(fields[21]) * page)


@functools.cache
def _units() -> tuple[int, int]:
    return os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")


def descendants(pid: int) -> list[int]:
    """Processes below one, parents first. Linux only; of a process that is gone: none."""
    processes: list[int] = []
    new = [pid]
    while new:
        parent = new.pop(0)
        try:
            for task in os.listdir(PROC / str(parent) / "task"):  # noqa: PTH208 - called every few milliseconds
                new += map(int, (PROC / str(parent) / "task" / task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            pass
        processes.append(parent)
    return processes[1:]


def root_folder(pid: int) -> Path:
    """The file system as a process sees it. Linux only."""
    return PROC / str(pid) / "root"


def mapped_user_ids() -> tuple[int, int]:
    """The first user id of this process's namespace and how many there are. Linux only."""
    first, _, count = map(int, (PROC / "self" / "uid_map").read_text().split()[:3])
    return first, count


# Limits, locks, network


def limit_address_space(size: int) -> bool:
    """Limit this process to `size` bytes of address space, for good; False on macOS, whose kernel does not limit it."""
    if sys.platform == "darwin":
        return False
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    return True


def open_file_limits() -> tuple[int | None, int | None]:
    """Soft and hard limit of open files; None for no limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (None if soft == resource.RLIM_INFINITY else soft), (None if hard == resource.RLIM_INFINITY else hard)


def lock_file(file: IO[bytes] | IO[str], *, exclusive: bool) -> None:
    """Take the operating system's lock of an open file without waiting; closing the file releases it.

    Raises:
        BlockingIOError: Another open file holds it.
        OSError: The file system has no locks (ENOLCK, ENOSYS, EOPNOTSUPP).

    """
    fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)


def loopback_interface() -> str | None:
    """Name of the network interface with the address 127.0.0.1: `lo` on Linux, `lo0` on macOS; None where none has it."""
    import psutil

    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if any(a.address == LOOPBACK for a in addresses)), None)
