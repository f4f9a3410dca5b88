"""What the tests of infra/ share: the tools that check its files, which `make check-infra` installs."""

import os
import subprocess
from pathlib import Path

from tests.conftest import ROOT
from tests.requirements import program, require


def tool(name: str) -> str:
    """The path of a program that checks files; without it the test is skipped, or fails under `make check-infra`."""
    require(name)
    path = program(name)
    assert path is not None
    return path


def check(*command: object, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a checking program; what it says is shown when it finds something."""
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done
