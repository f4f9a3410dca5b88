"""Running a program that a model wrote, with bubblewrap, so that it can do nothing but compute (no counterpart in the paper).

DeepSeek-R1 (section 2.2) names a compiler and test cases for its code rewards and says nothing of what holds the programs.
Here each has namespaces of its own (mounts, processes, network, IPC, users or a user id), a read-only system without home
folders, a small temporary folder, no environment, no privileges, a filter of system calls, and limits of wall-clock time,
processor time, memory, processes, output and disk. Expected results never enter; see `verifier.py` for the verdict.
"""

import functools
import inspect
import marshal
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stages.contract.config import ADDED, EXECUTION, Config, Expanded
from stages.contract.errors import UserError
from stages.rewards.code import boot
from stages.rewards.code.seccomp import REFUSED, call_filter
from stages.rewards.code.supervisor import Ended, Limits, SandboxFailed, Supervisor
from stages.runtime.platform import is_linux, mapped_user_ids, system_name, usable_cores

WHERE = "rewards.sandbox"
PYTHON = "/python"
"""Where an interpreter outside /usr lies in the sandbox: no folder above it, such as a home, is made there."""
_OPEN_FILES = 64
_MIB = 1 << 20


class Sandbox(Config):
    """What a judged program may use. Every limit but `answer_s` holds per run: one test case, or all asserts together."""

    isolation: Annotated[Literal["bubblewrap", "unsafe-none"], EXECUTION] = "bubblewrap"
    """`unsafe-none` runs what the model wrote with your rights and your network, under limits alone: only in a container or
    virtual machine that may break. `rewards.sandbox: unsafe-none` says the same."""
    python: Annotated[Annotated[str, Expanded] | None, EXECUTION] = None
    """Interpreter of the judged programs, such as `/usr/bin/python3`; by default the one that this environment was made with.
    Programs see its standard library and what is installed beside it, nothing of a virtual environment."""
    parallel: Annotated[int | None, EXECUTION] = Field(default=None, ge=1)
    """Programs judged at a time; by default one for each processor of this process, 8 at most."""
    time_s: float = Field(default=10.0, gt=0)
    """Wall-clock seconds, start of the interpreter not counted."""
    answer_s: Annotated[float | None, ADDED] = Field(default=None, gt=0)
    """Wall-clock seconds of all runs of one answer together, starts of the interpreter not counted: however many tests there
    are, one answer takes no longer. Null: six times `time_s`."""
    cpu_s: int = Field(default=5, ge=1)
    """Processor seconds of each process."""
    memory_mb: int = Field(default=512, ge=64)
    """MiB of address space of each process, and of resident memory of all together (shared pages counted in each)."""
    processes: int = Field(default=16, ge=1)
    """Processes and threads at a time."""
    output_kb: int = Field(default=1024, ge=1)
    """KiB of standard output and standard error together."""
    disk_mb: int = Field(default=64, ge=1)
    """MiB of the temporary folder (in memory), and of a file."""

    @model_validator(mode="before")
    @classmethod
    def _isolation_alone(cls, value: Any) -> Any:
        return {"isolation": value} if isinstance(value, str) else value

    @property
    def width(self) -> int:
        """Programs judged at a time."""
        return self.parallel or min(8, usable_cores())

    @property
    def whole_s(self) -> float:
        """Seconds of all runs of one answer together."""
        return 6 * self.time_s if self.answer_s is None else self.answer_s


def ready(settings: Sandbox) -> list[str]:
    """Remarks for the stage that is about to judge programs; `UserError` when they cannot be held here."""
    if not is_linux():
        mend = "use another verifier, or a Linux machine, container or virtual machine"
        raise UserError(f"programs are judged on Linux only, this is {system_name()}", where=WHERE, mend=mend)
    if settings.isolation == "unsafe-none":
        return ["warning: programs of the model ran without a sandbox (rewards.sandbox: unsafe-none)"]
    _try(settings.python)
    return []


def run(
    source: str, *, settings: Sandbox, stdin: bytes = b"", asked: list[str] | None = None, left_s: float | None = None
) -> Ended:
    """Run a program to its end. `SandboxFailed` when it did not start, `UserError` when there is no sandbox here.

    `asked`: expressions evaluated after the program, with its names. Standard output is then one JSON list with an item for
    each, `["value", encoded]` or `["raised", text]`; what the program prints goes to standard error.
    `left_s`: seconds that its answer has left, by default all; the stop is `answer time` where they are what ends it.
    """
    ready(settings)
    left_s = settings.whole_s if left_s is None else left_s
    if left_s >= settings.time_s:
        return _run(source, settings, stdin, asked)
    ended = _run(source, settings.model_copy(update={"time_s": left_s}), stdin, asked)
    return replace(ended, stop="answer time") if ended.stop == "time" else ended


def _run(source: str, settings: Sandbox, stdin: bytes, asked: list[str] | None) -> Ended:
    sandboxed = settings.isolation == "bubblewrap"
    uid = _free_uid() if sandboxed and os.geteuid() == 0 else None
    limits = Limits(settings.time_s, settings.cpu_s, settings.memory_mb * _MIB, settings.processes, settings.output_kb << 10)
    job = {
        "source": source,
        "asked": asked,
        "uid": uid,
        "first": sandboxed and uid is None,
        "limits": _kernel_limits(settings, uid, sandboxed=sandboxed),
    }
    with ExitStack() as held:
        ready_read, ready_write = os.pipe()
        held.callback(os.close, ready_read)
        try:
            job_fd = _memory_file(held, marshal.dumps(job, 4))
            passed, folder = [job_fd, ready_write], "/"
            if sandboxed:
                passed.append(_memory_file(held, call_filter(platform.machine())))
                command = _bubblewrap(settings, passed[-1], uid)
            else:
                command = [str(_interpreter(settings.python))]
                folder = held.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            process = subprocess.Popen(
                [*command, "-S", "-s", "-P", "-B", "-c", inspect.getsource(boot), str(job_fd), str(ready_write)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=passed,
                cwd=folder,
                env={} if sandboxed else _ENVIRONMENT,  # the first process in the sandbox shows what it was started with
                start_new_session=True,
            )
        finally:
            os.close(ready_write)
        return Supervisor(process, ready_read, stdin, limits, sandboxed=sandboxed).watch()


def _memory_file(held: ExitStack, content: bytes) -> int:
    descriptor = os.memfd_create("job")
    held.callback(os.close, descriptor)
    os.write(descriptor, content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _kernel_limits(settings: Sandbox, uid: int | None, *, sandboxed: bool) -> dict[str, tuple[int, int]]:
    """Soft and hard limits that the program's process takes itself, by their names in `resource`."""
    limits = {
        "RLIMIT_AS": settings.memory_mb * _MIB,
        "RLIMIT_FSIZE": settings.disk_mb * _MIB,
        "RLIMIT_NOFILE": _OPEN_FILES,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
    }
    if sandboxed:
        # One more than allowed, so that the excess is seen and named; and the first process, where it is the same user's.
        # Without the sandbox it would count all processes of the user.
        limits["RLIMIT_NPROC"] = settings.processes + 1 + (uid is None)
    return {name: (limit, limit) for name, limit in limits.items()} | {"RLIMIT_CPU": (settings.cpu_s, settings.cpu_s + 1)}


def _free_uid() -> int:
    """A user id for one program, when root judges: the kernel exempts root's own id from the limit of processes."""
    first, count = mapped_user_ids()
    low, high = (1 << 30, 1 << 31) if first == 0 and count > 1 << 31 else (20_000, 60_000)
    return random.SystemRandom().randrange(low, high)


def _interpreter(python: str | None) -> Path:
    path = Path(python or str(getattr(sys, "_base_executable", sys.executable))).resolve()
    if not os.access(path, os.X_OK):
        raise UserError(f"no interpreter at {path}", where=f"{WHERE}.python", mend="name one, such as /usr/bin/python3")
    return path


_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/tmp",  # noqa: S108 - the sandbox's own
    "PYTHONHASHSEED": "0",  # the same program has the same verdict each time
    "MALLOC_ARENA_MAX": "1",  # an arena for each thread reserves address space
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def _bubblewrap(settings: Sandbox, filter_fd: int, uid: int | None) -> list[str]:
    """The command up to the interpreter."""
    program = shutil.which("bwrap")
    assert program is not None
    python, environment = _interpreter(settings.python), dict(_ENVIRONMENT)
    command = [program, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    # Root needs no users of its own: the program becomes a user that nobody is, out of whose reach bubblewrap's first process
    # is. For others it has the same user, and no limits: they have a first process of their own instead (`sandbox_boot.reap`).
    command += ["--unshare-user", "--as-pid-1"] if uid is None else ["--cap-drop", "ALL"]
    for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_CHOWN") if uid is not None else ():
        command += ["--cap-add", capability]
    command += ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--ro-bind", "/usr", "/usr"]
    for path in map(Path, ("/bin", "/lib", "/lib32", "/lib64")):
        if path.is_symlink():
            command += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            command += ["--ro-bind", str(path), str(path)]
    command += ["--perms", "0755", "--dir", "/etc", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    if not python.is_relative_to("/usr"):
        command += ["--ro-bind", str(python.parents[1]), PYTHON]
        python = Path(PYTHON, "bin", python.name)
        environment["LD_LIBRARY_PATH"] = f"{PYTHON}/lib"
    command += ["--proc", "/proc", "--dev", "/dev"]
    for folder in ("/tmp", "/dev/shm"):  # noqa: S108 - the sandbox's own
        command += ["--perms", "1777", "--size", str(settings.disk_mb * _MIB), "--tmpfs", folder]
    # What bubblewrap makes these of is memory without a limit.
    command += ["--remount-ro", "/dev", "--remount-ro", "/", "--seccomp", str(filter_fd), "--clearenv"]
    for name, value in environment.items():
        command += ["--setenv", name, value]
    return [*command, "--chdir", _ENVIRONMENT["HOME"], "--", str(python)]


_PROBE = """
import os
assert sorted(os.listdir("/tmp")) == [], "the temporary folder is not its own"
assert not os.path.exists(input()), "a file outside is seen"
assert len([name for name in os.listdir("/proc") if name.isdigit()]) == 2, "processes outside are seen"
if os.fork() == 0:
    os._exit(0)
assert os.wait()[1] == 0
print("held")
"""


@functools.cache
def _try(python: str | None) -> None:
    """Refuse where the sandbox cannot be had, or does not hold what it should."""
    mend = f"or, in a machine of its own that may break, `{WHERE}: unsafe-none`"
    if shutil.which("bwrap") is None:
        raise UserError("bubblewrap is not installed", where=WHERE, mend=f"`apt-get install bubblewrap`, {mend}")
    if platform.machine() not in REFUSED:
        known = ", ".join(REFUSED)
        raise UserError(f"no filter of system calls for {platform.machine()} (only {known})", where=WHERE, mend=mend)
    with tempfile.NamedTemporaryFile() as outside:
        try:
            ended = _run(_PROBE, Sandbox(python=python), outside.name.encode() + b"\n", None)
        except SandboxFailed as error:
            said = str(error)
        else:
            said = "" if ended.stdout == b"held\n" else ended.stop or ended.stderr.strip()[-300:]
    if said:
        advice = "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1 and, on Ubuntu, "
        advice += "kernel.apparmor_restrict_unprivileged_userns=0; for a container --security-opt seccomp=unconfined)"
        raise UserError(f"bubblewrap does not work here: {said}", where=WHERE, mend=f"{advice}, {mend}")
