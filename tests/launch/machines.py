"""Two machines for tests: network namespaces of this one, each with an address of its own, and a cable that can be pulled.

They share files and processors; what they have of each other's network goes through the cable alone. Root only.
"""

import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT
from tests.requirements import require
from tests.stage_process import environment

ADDRESSES = ("192.0.2.1", "192.0.2.2")
"""Of a range that is for examples; they exist inside the namespaces alone."""
PORT = 29400


@dataclass(frozen=True)
class Machines:
    """The names of the two, and of each one's end of the cable."""

    names: tuple[str, str]
    ends: tuple[str, str]

    def start(self, number: int, *command: object, log: Path) -> subprocess.Popen[bytes]:
        """Start our Python with these arguments on a machine."""
        inside = ["ip", "netns", "exec", self.names[number], sys.executable, *map(str, command)]
        with log.open("ab") as file:
            return subprocess.Popen(inside, cwd=ROOT, env=environment(), stdout=file, stderr=file)

    def join(self, number: int, folder: Path, *options: object, log: Path) -> subprocess.Popen[bytes]:
        """Have a machine take part in a stage."""
        return self.start(number, "-m", "flows.cli", "join", folder, "--node-rank", number, *options, log=log)

    def cable(self, state: str) -> None:
        """Pull the cable (`down`) or put it back (`up`), at the second machine's end."""
        _ip("-n", self.names[1], "link", "set", self.ends[1], state)


@contextmanager
def two_machines() -> Iterator[Machines]:
    """The machines, while the block lasts. Skips the test where namespaces cannot be made."""
    require("iproute2", "root", "network namespaces")
    mark = secrets.token_hex(3)
    names, ends = (f"r1-{mark}-a", f"r1-{mark}-b"), (f"r1{mark}a", f"r1{mark}b")
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            _ip("-n", name, "link", "set", end, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield Machines(names, ends)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
