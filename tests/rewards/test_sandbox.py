"""Real programs under bubblewrap: none gets out, and each that is stopped is named."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from pydantic import ValidationError

from stages.contract.errors import UserError
from stages.rewards.code import sandbox
from stages.rewards.code.sandbox import Sandbox, ready, run
from stages.rewards.code.seccomp import REFUSED
from stages.rewards.code.supervisor import cause
from stages.rewards.code.verifier import Judgement, judgements
from tests.conftest import ROOT
from tests.faults.hostile import PROGRAMS, Hostile
from tests.requirements import needs, require

needs_bubblewrap = needs("bubblewrap")
TOKEN = "what-no-program-may-read"
LIMITS = Sandbox(time_s=120.0, cpu_s=1, memory_mb=192, processes=8, output_kb=256, disk_mb=4)
QUICK = LIMITS.model_copy(update={"time_s": 0.5})
ASSERTS = '{"asserts": ["assert add(2, 3) == 5", "assert add(\'a\', \'b\') == \'ab\'", "assert not add(1, 1) == 3"]}'


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """What lies outside: a secret file, a listening port, an abstract socket, a variable; all must stay untouched."""
    folder = tmp_path_factory.mktemp("outside")
    folder.chmod(0o777)
    secret = folder / "secret"
    secret.write_text(TOKEN)
    os.environ["R1_TEST_TOKEN"] = TOKEN
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0r1-test-{os.getpid()}")
        abstract.listen()
        yield {
            "secret": str(secret),
            "folder": str(folder),
            "token": TOKEN,
            "port": server.getsockname()[1],
            "abstract": f"r1-test-{os.getpid()}",
        }
        for listening in (server, abstract):
            listening.setblocking(False)
            with pytest.raises(BlockingIOError):
                listening.accept()
    assert secret.read_text() == TOKEN
    assert [path.name for path in folder.iterdir()] == ["secret"]
    assert not list(Path("/").glob("*/marker-of-hostile"))
    del os.environ["R1_TEST_TOKEN"]


def judged(source: str, settings: Sandbox = LIMITS, *, style: str = "stdin", expected: str = TOKEN) -> Judgement:
    reference = ASSERTS if style == "asserts" else f'{{"stdin": [{{"input": "", "output": "{expected}"}}]}}'
    (judgement,) = judgements([(reference, f"```python\n{source}\n```")], settings)
    return judgement


def children() -> set[int]:
    """Processes below this one; those of other verifiers may be among them."""
    return {process.pid for process in psutil.Process().children(recursive=True)}


@needs_bubblewrap
@pytest.mark.parametrize("hostile", PROGRAMS, ids=lambda h: h.name)
def test_no_program_gets_out_and_each_is_named(hostile: Hostile, outside) -> None:
    before = children()
    judgement = judged(hostile.source.format(**outside), QUICK if hostile.quick else LIMITS, style=hostile.style)
    assert (judgement.verdict, judgement.reason) == ("wrong", hostile.reason), judgement
    assert hostile.detail in judgement.detail
    assert children() <= before


@needs_bubblewrap
def test_what_a_reader_of_secrets_would_win_is_the_token(outside) -> None:
    """The reading programs would be right if they could read: here is one that may."""
    assert judged(f"print('{TOKEN}')").verdict == "right"


SEARCH = """
import gc, os, re, sys
def found(*given):
    wanted = "-".join(["what", "no", "[a-z-]+"])
    seen = [repr([thing for thing in gc.get_objects() if isinstance(thing, (str, bytes, list, dict, tuple))])]
    frame = sys._getframe(1)
    while frame:
        seen.append(repr(frame.f_locals))
        frame = frame.f_back
    for path in ("/proc/self/cmdline", "/proc/self/environ", "/proc/1/cmdline"):
        try:
            seen.append(open(path).read())
        except OSError:
            pass
    try:
        with open("/proc/self/mem", "rb") as memory:
            for line in open("/proc/self/maps"):
                if "[heap]" in line or "00:00 0" in line:
                    first, last = (int(part, 16) for part in line.split()[0].split("-"))
                    try:
                        memory.seek(first)
                        seen.append(memory.read(min(last - first, 1 << 24)).decode("latin-1"))
                    except (OSError, OverflowError, ValueError):
                        pass
    except OSError:
        pass
    match = re.search(wanted, " ".join(seen))
    return match and match[0]
"""


@needs_bubblewrap
def test_expected_results_are_nowhere_inside() -> None:
    """A program that searches its objects, the frames above it and its memory; the control finds what it was given."""
    settings = LIMITS.model_copy(update={"memory_mb": 512})
    program = f"```python\n{SEARCH}\n```"
    hidden, given = (f'{{"asserts": ["assert found({call}) == \\"{TOKEN}\\""]}}' for call in ("", f"'{TOKEN}'"))
    assert [(j.verdict, j.reason) for j in judgements([(hidden, program), (given, program)], settings)] == [
        ("wrong", "differs"),
        ("right", None),
    ]
    cases = f'{{"function": "found", "cases": [{{"args": [], "returns": "{TOKEN}"}}]}}'
    assert judgements([(cases, program)], settings)[0].reason == "differs"


EQUALS = """
def rights(pid):
    wanted = ("Cap", "NoNewPrivs", "Seccomp", "Uid", "Gid", "Groups")
    status = [line for line in open(f"/proc/{pid}/status") if line.startswith(wanted)]
    return status, open(f"/proc/{pid}/limits").read()
status, _ = rights("self")
assert "CapEff:\\t0000000000000000\\n" in status and "CapPrm:\\t0000000000000000\\n" in status, status
assert "NoNewPrivs:\\t1\\n" in status and "Seccomp:\\t2\\n" in status, status
try:
    open("/proc/1/mem", "r+b").close()
except PermissionError:
    print("fine")
else:
    print("fine" if rights("self") == rights(1) else rights(1))
"""


@needs_bubblewrap
def test_the_first_process_is_out_of_reach_or_has_no_more_rights_and_limits() -> None:
    ended = run(EQUALS, settings=LIMITS)
    assert (ended.stdout, ended.stderr) == (b"fine\n", "")


@needs_bubblewrap
def test_only_the_temporary_folders_can_be_written_and_they_are_small() -> None:
    ended = run("print(open('/proc/self/mounts').read())", settings=LIMITS)
    mounts = [line.split()[1:4] for line in ended.stdout.decode().splitlines() if line]
    writable = {place: options for place, _, options in mounts if "rw" in options.split(",")}
    plain = {place for place in writable if not place.startswith(("/proc", "/dev/"))} | {p for p in writable if "shm" in p}
    assert plain == {"/tmp", "/dev/shm"}
    assert all("size=4096k" in writable[place] for place in plain)
    assert {"/", "/usr", "/dev"} <= {place for place, _, _ in mounts}


@needs_bubblewrap
def test_with_the_judge_dies_the_program() -> None:
    script = (
        "from stages.rewards.code.sandbox import *; import sys; print('up', flush=True); "
        "run('import os, time\\nif os.fork() == 0: os.setsid()\\ntime.sleep(1000)', settings=Sandbox(time_s=500))"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE) as judge:
        assert judge.stdout is not None
        judge.stdout.readline()
        tree: list[psutil.Process] = []
        deadline = time.monotonic() + 60
        while len(tree) < 4 and time.monotonic() < deadline:  # bubblewrap, its first process, the program, its child
            tree = psutil.Process(judge.pid).children(recursive=True)
            time.sleep(0.02)
        judge.send_signal(signal.SIGKILL)
    assert len(tree) == 4
    _, alive = psutil.wait_procs(tree, timeout=20)
    assert not alive


@needs_bubblewrap
def test_the_time_of_a_stopped_program_is_its_limit() -> None:
    begun = time.monotonic()
    ended = run("import time\ntime.sleep(1000)", settings=QUICK)
    assert ended.stop == "time"
    assert 0.5 <= time.monotonic() - begun < 10


@needs_bubblewrap
def test_output_is_cut_while_it_is_read() -> None:
    ended = run("import os\nwhile True: os.write(1, b'x' * 65536)", settings=LIMITS)
    assert ended.stop == "output"
    assert 256 << 10 < len(ended.stdout) <= (256 << 10) + 2 * 65536


@needs_bubblewrap
def test_output_and_processes_up_to_the_limit_are_allowed() -> None:
    ended = run("print('x' * ((256 << 10) - 1))", settings=LIMITS)
    assert (ended.stop, ended.code, len(ended.stdout)) == (None, 0, 256 << 10)
    eight = "import threading, time\nts = [threading.Thread(target=time.sleep, args=(0.3,)) for _ in range(7)]\n"
    eight += "[t.start() for t in ts]\n[t.join() for t in ts]\nprint('done')"
    assert run(eight, settings=LIMITS).stdout == b"done\n"
    assert run(eight, settings=LIMITS.model_copy(update={"processes": 7})).stop == "processes"


@needs_bubblewrap
def test_input_that_is_not_read_does_not_block() -> None:
    assert run("print(1)", settings=LIMITS, stdin=b"x" * (1 << 20)).stdout == b"1\n"
    assert run("print(len(open('/dev/stdin').read()))", settings=LIMITS, stdin=b"x" * (1 << 20)).stdout == b"1048576\n"


@needs_bubblewrap
def test_the_same_program_has_the_same_output_each_time() -> None:
    assert len({run("print(set('abcdefgh'))", settings=LIMITS).stdout for _ in range(3)}) == 1


def bubblewrap_that(folder: Path, script: str, monkeypatch) -> None:
    """Put a `bwrap` first in the path, and forget what was tried before."""
    program = folder / "bwrap"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    sandbox._try.cache_clear()


def test_without_bubblewrap_the_stage_does_not_start(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox._try.cache_clear()
    with pytest.raises(UserError) as refused:
        ready(Sandbox())
    assert str(refused.value).startswith("rewards.sandbox: bubblewrap is not installed; `apt-get install bubblewrap`")
    with pytest.raises(UserError):
        judgements([(ASSERTS, "no code")], Sandbox())


def test_where_namespaces_are_forbidden_the_stage_does_not_start(tmp_path, monkeypatch) -> None:
    bubblewrap_that(tmp_path, "echo 'bwrap: No permissions to create new namespace' >&2; exit 1", monkeypatch)
    with pytest.raises(UserError, match="does not work here: bwrap: No permissions to create new namespace; allow user name"):
        ready(Sandbox())


def test_a_sandbox_that_does_not_hold_is_refused(tmp_path, monkeypatch) -> None:
    """A `bwrap` that only runs the command: the temporary folder is everybody's."""
    (Path("/tmp") / f"r1-seen-{os.getpid()}").touch()
    bubblewrap_that(tmp_path, 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"', monkeypatch)
    with pytest.raises(UserError, match="bubblewrap does not work here"):
        ready(Sandbox(python="/usr/bin/python3" if Path("/usr/bin/python3").exists() else None))
    (Path("/tmp") / f"r1-seen-{os.getpid()}").unlink()


@needs_bubblewrap
def test_a_sandbox_that_fails_later_gives_no_verdict(tmp_path, monkeypatch) -> None:
    real = shutil.which("bwrap")
    bubblewrap_that(
        tmp_path, f'[ -e {tmp_path}/broken ] && {{ echo out of namespaces >&2; exit 1; }}; exec {real} "$@"', monkeypatch
    )
    ready(LIMITS)
    (tmp_path / "broken").touch()
    judgement = judged(f"print('{TOKEN}')")
    assert (judgement.verdict, judgement.reason, judgement.detail) == ("none", "sandbox", "out of namespaces")


def test_the_unsafe_mode_is_asked_for_by_name_and_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    unsafe = Sandbox.model_validate("unsafe-none")
    assert unsafe == Sandbox(isolation="unsafe-none")
    assert ready(unsafe) == ["warning: programs of the model ran without a sandbox (rewards.sandbox: unsafe-none)"]
    with pytest.raises(ValidationError):
        Sandbox.model_validate("none")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("print('x')", None),
        ("print('y')", "differs"),
        ("import os, time\nos.fork()\ntime.sleep(100)", "time"),
        ("a = b'x' * (1 << 40)", "memory"),
        ("while True: print('x' * 1000)", "output"),
        ("while True: pass", "processor time"),
    ],
)
def test_limits_hold_in_the_unsafe_mode_too(source, reason) -> None:
    quick = {"time_s": 0.5} if reason == "time" else {}
    settings = LIMITS.model_copy(update={"isolation": "unsafe-none", **quick})
    before = children()
    assert judged(source, settings, expected="x").reason == reason
    assert children() <= before


@pytest.mark.parametrize(
    ("path", "machine"),
    [("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "x86_64"), ("/usr/include/asm-generic/unistd.h", "aarch64")],
)
def test_numbers_of_calls_are_the_kernels(path, machine) -> None:
    require("x86-64 kernel headers" if machine == "x86_64" else "kernel headers")
    words = [line.split() for line in Path(path).read_text().splitlines() if line.startswith("#define __NR")]
    numbers = {w[1].removeprefix("__NR3264_").removeprefix("__NR_"): w[2] for w in words if len(w) > 2}
    assert {name: numbers[name] for name in REFUSED[machine]} == {name: str(n) for name, n in REFUSED[machine].items()}


def test_exceptions_name_the_limit_they_speak_of() -> None:
    assert cause("Traceback\nMemoryError\n") == "memory"
    assert cause("Traceback\nOSError: [Errno 28] No space left on device: 'a'") == "disk"
    assert cause("MemoryError\nValueError: 3") is None
    assert cause("") is None
