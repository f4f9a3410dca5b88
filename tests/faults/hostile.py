"""Programs that try to get out of the sandbox, to win without solving, or to take the machine down.

Where a program reads something, the reference is what it would read: had it read it, it would be judged right. `{secret}` is
a file outside that holds `{token}`, `{port}` a listening port of the machine, `{abstract}` a listening abstract Unix socket.
"""

from dataclasses import dataclass
from typing import Literal

from stages.rewards.code.verifier import Reason


@dataclass(frozen=True)
class Hostile:
    name: str
    source: str
    reason: Reason
    """What must be named."""
    detail: str = ""
    """A part of what must be said besides."""
    style: Literal["stdin", "asserts"] = "stdin"
    quick: bool = False
    """Stopped by the clock: gets half a second."""


LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
TELL = "\nprint('{token}' if done >= 0 else ctypes.get_errno())"

READING = [
    Hostile("a secret file", "print(open('{secret}').read())", "error", "FileNotFoundError"),
    Hostile(
        "through a symlink", "import os\nos.symlink('{secret}', 'a')\nprint(open('a').read())", "error", "FileNotFoundError"
    ),
    Hostile(
        "through the working folder", "print(open('/proc/self/cwd/../../../..{secret}').read())", "error", "FileNotFoundError"
    ),
    Hostile("passwords", "print(open('/etc/passwd').read() and '{token}')", "error", "FileNotFoundError"),
    Hostile(
        "homes",
        "import os\nfor folder in ('/root', '/home', '/work', '/var', '/etc/ssl', '/sys', '/mnt', '/opt', '/run'):\n"
        "    if os.path.exists(folder): print('{token}')",
        "differs",
    ),
    Hostile("the environment", "import os\nprint(os.environ['R1_TEST_TOKEN'])", "error", "KeyError"),
    Hostile(
        "what others were started with",
        "import glob\nfor path in glob.glob('/proc/*/environ') + glob.glob('/proc/*/cmdline'):\n"
        "    try:\n        if '-'.join(['R1', 'TEST']).replace('-', '_') in open(path).read():\n            print('{token}')\n"
        "    except OSError: pass",
        "differs",
    ),
    Hostile(
        "descriptors of the first process",
        "import os\nfor n in range(300):\n    for root in ('/proc/1/fd/%d', '/proc/1/root/tmp/%d', '/proc/self/fd/%d'):\n"
        "        try:\n            if n > 2 and os.path.exists(root % n): print('{token}')\n        except OSError: pass",
        "differs",
    ),
    Hostile(
        "device files",
        "import os\nfor path in ('/dev/mem', '/dev/kmsg', '/dev/sda', '/dev/vda', '/dev/fuse', '/dev/kvm'):\n"
        "    if os.path.exists(path): print('{token}')\n"
        "try:\n    os.mknod('/tmp/mem', 0o020666, os.makedev(1, 1))\n    open('/tmp/mem', 'rb')\n    print('{token}')\n"
        "except OSError as e: print(e)",
        "differs",
    ),
    Hostile("the key ring", LIBC + "done = libc.syscall(250, 0, -3, 1)" + TELL, "differs"),
]
WRITING = [
    Hostile(
        "files outside",
        "import os\nfor folder in ('/', '/usr', '/usr/bin', '/etc', '/dev', '/proc', '/python', '/bin', '{folder}'):\n"
        "    for mode in 'wa':\n        try:\n            open(folder + '/marker-of-hostile', mode)\n"
        "            print('{token}')\n        except OSError: pass",
        "differs",
    ),
    Hostile("settings of the kernel", "open('/proc/sys/kernel/hostname', 'w').write('x')\nprint('{token}')", "error", "Error"),
    Hostile(
        "the pattern of dumps", "open('/proc/sys/kernel/core_pattern', 'w').write('|x')\nprint('{token}')", "error", "Error"
    ),
    Hostile("deleting everything", "import shutil\nshutil.rmtree('/usr')\nprint('{token}')", "error", "Error"),
    Hostile("deleting the interpreter", "import os, sys\nos.remove(sys.executable)\nprint('{token}')", "error", "Read-only"),
    Hostile("a huge file", "with open('a', 'wb') as f:\n    while True: f.write(b'x' * 65536)", "disk", "[Errno 2"),
    Hostile("a file with a hole", "import os\nos.truncate(os.open('a', 66), 1 << 34)", "disk", "[Errno 27]"),
    Hostile("many files", "n = 0\nwhile True:\n    open(f'{{n}}', 'w').close()\n    n += 1", "disk"),
    Hostile(
        "shared memory",
        "n = 0\nwhile True:\n    n += 1\n    open(f'/dev/shm/{{n}}', 'wb').write(b'x' * 1000000)",
        "disk",
        "[Errno 28]",
    ),
]
TAKING = [
    Hostile("a fork bomb", "import os\nwhile True: os.fork()", "processes"),
    Hostile(
        "a patient fork bomb",
        "import os, time\nwhile True:\n    try:\n        if os.fork() == 0: os.setsid()\n    except OSError: time.sleep(0.01)",
        "processes",
    ),
    Hostile(
        "threads", "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()", "processes"
    ),
    Hostile("memory", "a = []\nwhile True: a.append(bytearray(1 << 20))", "memory"),
    Hostile("memory at once", "a = b'x' * (1 << 40)", "memory", "MemoryError"),
    Hostile(
        "memory over many processes",
        "import os, time\nfor _ in range(6):\n    if os.fork() == 0:\n        a = bytearray(os.urandom(1 << 20)) * 70\n"
        "        time.sleep(60)\ntime.sleep(60)",
        "memory",
    ),
    Hostile("memory without owner", LIBC + "done = libc.shmget(0, 1 << 24, 0o1600)" + TELL, "differs"),
    Hostile("memory in a nameless file", "import os\nos.memfd_create('a')\nprint('{token}')", "error", "PermissionError"),
    Hostile("endless output", "while True: print('x' * 1000)", "output"),
    Hostile("endless errors", "import sys\nwhile True: sys.stderr.write('x' * 1000)", "output"),
    Hostile("another program's output", "import os\nos.execv('/usr/bin/yes', ['yes'])", "output"),
    Hostile("sleeping", "import time\ntime.sleep(1000)", "time", quick=True),
    Hostile("stopping itself", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "time", quick=True),
    Hostile(
        "deaf to signals",
        "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: time.sleep(1)",
        "time",
        quick=True,
    ),
    Hostile("computing", "while True: pass", "processor time"),
    Hostile("computing on", "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "processor time"),
    Hostile(
        "raising its limits",
        "import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))\nprint('{token}')",
        "error",
        "ValueError",
    ),
    Hostile(
        "a daemon", "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)", "differs"
    ),
]
REACHING = [
    Hostile(
        "the machine's ports",
        "import socket\nsocket.create_connection(('127.0.0.1', {port}), 5)\nprint('{token}')",
        "error",
        "refused",
    ),
    Hostile(
        "the internet", "import socket\nsocket.create_connection(('1.1.1.1', 53), 5)\nprint('{token}')", "error", "unreachable"
    ),
    Hostile(
        "an abstract socket",
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect(chr(0) + '{abstract}')\nprint('{token}')",
        "error",
        "refused",
    ),
    Hostile(
        "the virtual machine's host",
        "import socket\nsocket.socket(40, socket.SOCK_STREAM)\nprint('{token}')",
        "error",
        "[Errno 97]",
    ),
    Hostile(
        "raw packets",
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, 1)\nprint('{token}')",
        "error",
        "PermissionError",
    ),
    Hostile(
        "signals to its parents",
        "import os, signal\nfor pid in (os.getppid(), 1, 0, -1):\n"
        "    for s in (signal.SIGUSR1, signal.SIGSTOP, signal.SIGKILL):\n"
        "        if pid == 0 and s != signal.SIGUSR1: continue\n"
        "        signal.signal(signal.SIGUSR1, signal.SIG_IGN)\n"
        "        try: os.kill(pid, s)\n        except OSError: pass\nprint('alive')",
        "differs",
    ),
    Hostile("ptrace", LIBC + "done = libc.ptrace(16, 1, 0, 0)" + TELL, "differs"),
    Hostile("mounting", LIBC + "done = libc.mount(b'proc', b'/tmp', b'proc', 0, 0)" + TELL, "differs"),
    Hostile("users of its own", LIBC + "done = libc.unshare(0x10000000)" + TELL, "differs"),
    Hostile("users of its own by clone", LIBC + "done = libc.syscall(56, 0x10000011, 0, 0, 0, 0)" + TELL, "differs"),
    Hostile(
        "becoming root",
        "import os\nos.setuid(0) if os.getuid() else os.setgroups([1])\nprint('{token}')",
        "error",
        "Error",
    ),
    Hostile("another root", "import os\nos.chroot('/tmp')\nprint('{token}')", "error", "PermissionError"),
    Hostile(
        "the terminal",
        "import fcntl, os\nfcntl.ioctl(os.open('/dev/tty', 2), 0x5412, b'x')\nprint('{token}')",
        "error",
        "OSError",
    ),
    Hostile("dying by a signal", "import os\nos.kill(os.getpid(), 9)", "signal"),
    Hostile("dying of bad memory", "import ctypes\nctypes.string_at(0)", "signal"),
]
# The asserts: add(2, 3) == 5, add("a", "b") == "ab", not add(1, 1) == 3.
FORGING = [
    Hostile("leaving early", "import sys\nsys.exit(0)", "no result", style="asserts"),
    Hostile("leaving when asked", "def add(a, b): raise SystemExit(0)", "no result", style="asserts"),
    Hostile(
        "writing the verdict everywhere",
        'import os\nfor n in range(64):\n    try: os.write(n, b\'[["value", true], ["value", true], ["value", true]]\')\n'
        "    except OSError: pass\nos._exit(0)",
        "differs",
        style="asserts",
    ),
    Hostile(
        "an exit handler",
        "import atexit, os\natexit.register(lambda: os.write(3, b'right'))\natexit.register(print, 'right')\n"
        "raise SystemExit(0)",
        "no result",
        style="asserts",
    ),
    Hostile(
        "equal to everything",
        "class E:\n    def __eq__(self, o): return True\ndef add(a, b): return E()",
        "differs",
        style="asserts",
    ),
    Hostile(
        "a number equal to everything",
        "class E(int):\n    __eq__ = lambda s, o: True\n    __hash__ = None\ndef add(a, b): return E(7)",
        "differs",
        style="asserts",
    ),
    Hostile(
        "a text equal to everything",
        "class E(str):\n    __eq__ = lambda s, o: True\n    def __str__(self): return self\ndef add(a, b): return E('x')",
        "differs",
        style="asserts",
    ),
    Hostile(
        "other builtins",
        "import builtins, json\njson.dumps = lambda x: '[' + ','.join(['[\"value\", true]'] * 3) + ']'\n"
        "builtins.eval = builtins.bool = builtins.compile = lambda *a: True\ndef add(a, b): return 0",
        "differs",
        style="asserts",
    ),
    Hostile("no values", "import os\nos.write(3, b'[]')\nos._exit(0)", "no result", style="asserts"),
    Hostile("a value without end", "def add(a, b): return list(range(100000))", "output", style="asserts"),
    Hostile(
        "a value without bottom",
        "def add(a, b):\n    x = []\n    for _ in range(100000): x = [x]\n    return x",
        "error",
        "RecursionError",
        style="asserts",
    ),
    Hostile(
        "an answer without bottom",
        "import os\nos.write(3, b'[' * 60000)\nos._exit(0)",
        "no result",
        style="asserts",
    ),
    Hostile(
        "a kind that there is not",
        'import os\nos.write(3, b\'[["value", {{"x": 1}}], ["value", {{}}], [1, 2]]\')\nos._exit(0)',
        "differs",
        style="asserts",
    ),
]
PROGRAMS = [*READING, *WRITING, *TAKING, *REACHING, *FORGING]
