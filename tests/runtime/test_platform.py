"""The calls that not every system has: what they say on Linux, and what is left where one is absent."""

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from flows.doctor import host
from flows.processes import birth
from stages.contract.errors import UserError
from stages.engine import distributed
from stages.kinds.model import _cpu_has_bf16
from stages.rewards.code import sandbox
from stages.runtime import platform
from tests.conftest import ROOT


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    """Writes this process's line of /proc/self/cgroup and files of /sys/fs/cgroup; eight cores in the affinity mask."""
    monkeypatch.setattr(platform, "PROC", tmp_path / "proc")
    monkeypatch.setattr(platform, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))

    def write(line: str, files: dict[str, str]) -> None:
        for path, text in {"proc/self/cgroup": line, **{f"cgroup/{name}": text for name, text in files.items()}}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text + "\n")

    return write


@pytest.mark.parametrize(
    ("line", "files", "cores"),
    [
        pytest.param("0::/", {"cpu.max": "max 100000"}, 8, id="no limit"),
        pytest.param("0::/", {"cpu.max": "150000 100000"}, 2, id="one and a half rounds up"),
        pytest.param("0::/", {"cpu.max": "10000 100000"}, 1, id="a tenth is one core"),
        pytest.param("0::/", {"cpu.max": "6400000 100000"}, 8, id="more than the mask"),
        pytest.param("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3, id="limit of the parent"),
        pytest.param("0::/a", {"a/cpu.max": "500000 100000", "cpu.max": "400000 100000"}, 4, id="the smallest counts"),
        pytest.param(
            "3:cpu,cpuacct:/x", {"cpu/x/cpu.cfs_quota_us": "200000", "cpu/x/cpu.cfs_period_us": "100000"}, 2, id="version 1"
        ),
        pytest.param("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8, id="version 1, none"),
        pytest.param("0::/../../outside", {}, 8, id="a group outside the namespace"),
    ],
)
def test_usable_cores_are_capped_by_the_cgroup_quota(cgroup, line, files, cores):
    cgroup(line, files)
    assert platform.usable_cores() == cores


def test_usable_cores_without_affinity_or_cgroups_are_the_machines(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    monkeypatch.setattr(platform, "PROC", tmp_path)
    assert platform.usable_cores() == 10


def test_memory_limit_is_the_smallest_of_the_cgroups(cgroup):
    cgroup("0::/a", {"a/memory.max": "max", "memory.max": "4096"})
    assert platform.memory_limit() == 4096
    cgroup("0::/a", {"a/memory.max": "max", "memory.max": "max"})
    assert platform.memory_limit() is None


def test_without_proc_readers_return_none(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "PROC", tmp_path)
    assert platform.start_of_process(os.getpid()) is None
    assert platform.peak_memory() is None
    assert platform.memory_limit() is None
    assert platform.processor_features() is None
    assert birth(os.getpid()) == psutil.Process().create_time()
    assert _cpu_has_bf16(), "unknown counts as present"
    assert platform.processor_identity(), "a library of kernels still has a name"


def test_processor_features_of_x86_and_arm_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "PROC", tmp_path)
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags\t\t: fpu avx2 fma\n\nprocessor : 1\nflags : other\n")
    assert platform.processor_features() == {"fpu", "avx2", "fma"}
    assert not _cpu_has_bf16()
    (tmp_path / "cpuinfo").write_text("processor : 0\nFeatures : fp asimd bf16\nCPU part : 0xd4f\n")
    assert platform.processor_features() == {"fp", "asimd", "bf16"}
    assert _cpu_has_bf16()
    assert "CPU part : 0xd4f" in platform.processor_identity()


def test_peak_memory_is_at_least_the_resident_memory():
    peak = platform.peak_memory()
    assert peak is not None
    assert peak >= psutil.Process().memory_info().rss * 0.9


def interfaces(**addresses: str) -> dict[str, list[SimpleNamespace]]:
    return {name: [SimpleNamespace(address="fe80::1"), SimpleNamespace(address=address)] for name, address in addresses.items()}


def test_loopback_interface_is_found_by_its_address(monkeypatch):
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces(en0="192.168.1.5", lo0="127.0.0.1"))
    assert platform.loopback_interface() == "lo0"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    distributed._use_loopback()
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo0", "eth7")


def test_missing_loopback_is_a_users_mistake(monkeypatch):
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces(eth0="10.0.0.2"))
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(UserError, match=r"network: no network interface has the address 127\.0\.0\.1; bring loopback up"):
        distributed._use_loopback()


def test_address_space_is_limited_on_linux_and_not_on_macos():
    code = (
        "import mmap, sys\nfrom stages.runtime.platform import limit_address_space\n{}\nheld = limit_address_space(1 << 30)\n"
    )
    code += "try:\n    size = len(mmap.mmap(-1, 2 << 30))\nexcept OSError:\n    size = 0\nprint(held, size >> 30)"
    said = {
        system: subprocess.run(
            [sys.executable, "-c", code.format(f"sys.platform = {system!r}")], capture_output=True, text=True, check=True
        ).stdout.split()
        for system in ("linux", "darwin")
    }
    assert said == {"linux": ["True", "0"], "darwin": ["False", "2"]}


def test_doctor_without_shared_memory_or_a_limit_of_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "SHARED_MEMORY", tmp_path / "none")
    found = host._shared_memory()
    assert (found.state, found.mend) == ("warn", "weights for vLLM go through the disk")
    monkeypatch.setattr(platform.resource, "getrlimit", lambda _name: (platform.resource.RLIM_INFINITY,) * 2)
    assert platform.open_file_limits() == (None, None)
    assert host._open_files().found == "no limit"
    monkeypatch.setattr(platform.resource, "getrlimit", lambda _name: (256, 4096))
    assert host._open_files().mend == "ulimit -n 4096"


def test_kill_group_ends_it_and_ignores_one_that_is_gone():
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    platform.kill_group(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    platform.kill_group(process.pid, signal.SIGKILL)


def test_kill_group_of_zombies_on_macos_is_no_error(monkeypatch):
    def refuse(_leader, _number):
        raise PermissionError

    monkeypatch.setattr(os, "killpg", refuse)
    with pytest.raises(PermissionError):
        platform.kill_group(1, signal.SIGKILL)
    monkeypatch.setattr(sys, "platform", "darwin")
    platform.kill_group(1, signal.SIGKILL)


def test_descendants_and_usage_of_a_process():
    with subprocess.Popen([sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '60'])"]) as process:
        while not (below := platform.descendants(process.pid)):
            assert process.poll() is None
        usage = platform.process_usage(process.pid)
        memory = psutil.Process(process.pid).memory_info().rss
        for pid in (*below, process.pid):
            os.kill(pid, signal.SIGKILL)
    assert len(below) == 1
    assert usage.threads == 1
    assert memory / 2 < usage.resident < memory * 2
    assert platform.descendants(process.pid) == []


def test_code_rewards_are_refused_by_name_outside_linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    for isolation in ("bubblewrap", "unsafe-none"):
        with pytest.raises(UserError, match="programs are judged on Linux only, this is macOS"):
            sandbox.ready(sandbox.Sandbox(isolation=isolation))


@pytest.mark.parametrize("module", ["flows.cli", "stages"])
def test_native_windows_is_refused_in_one_line(module):
    code = "import sys, runpy\nsys.platform = 'win32'\n"
    code += "for name in ('fcntl', 'resource', 'psutil', 'pwd', 'grp', 'termios'):\n    sys.modules[name] = None\n"
    code += f"sys.argv = ['r1', '--version']\nrunpy.run_module({module!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("r1: platform: native Windows is not supported; use WSL2")
    assert len(done.stderr.splitlines()) == 1


OWNER = Path("stages/runtime/platform.py")
MODULES = ("fcntl", "resource", "pwd", "grp", "termios")
CALLS = ("sched_getaffinity", "cpu_count", "killpg", "sysconf", "setrlimit", "getrlimit", "getrusage", "flock", "net_if_addrs")
PATHS = ("/proc", "/sys/", "/dev/shm")
WORDS = (*MODULES, *CALLS, *PATHS, '"lo"', '"lo0"')
"""Parsing takes a while: modules without any of these are left out."""
ALLOWED = {
    ("stages/rewards/code/boot.py", "resource"),  # its text runs alone inside the sandbox
    ("stages/rewards/code/boot.py", "setrlimit"),
    ("stages/rewards/code/boot.py", "/proc/self/oom_score_adj"),
    ("stages/rewards/code/sandbox.py", "/proc"),  # folders of the sandbox's own
    ("stages/rewards/code/sandbox.py", "/dev/shm"),
    ("flows/launch/local.py", "net_if_addrs"),  # the interface between machines, which every system can tell
}


def platform_calls(source: str) -> Iterator[str]:
    """Modules, functions and paths in a module's code that not every system has. Texts for users are no paths."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            yield node.module
        elif isinstance(node, ast.Attribute) and node.attr in CALLS:
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
            if node.value.startswith(PATHS) and " " not in node.value:
                yield node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("setdefault", "update"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and a.value in ("lo", "lo0"))


def test_platform_calls_are_found():
    source = (
        "import fcntl\nfrom resource import setrlimit\nos.sched_getaffinity(0)\nPath(f'/proc/{1}')\nenv.setdefault('A', 'lo')"
    )
    assert sorted(platform_calls(source)) == ["/proc/", "fcntl", "lo", "resource", "sched_getaffinity"]


def test_platform_calls_are_in_one_module():
    found = {
        (str(path.relative_to(ROOT)), call)
        for folder in ("flows", "stages")
        for path in (ROOT / folder).rglob("*.py")
        if path.relative_to(ROOT) != OWNER
        if any(word in (source := path.read_text(encoding="utf-8")) for word in WORDS)
        for call in platform_calls(source)
    }
    assert found == ALLOWED
