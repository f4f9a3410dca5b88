"""What the tests of infra/ share: the tools that check its files, which `make check-infra` installs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.pipeline.conftest import model_folder, recipe, runs  # noqa: F401 - fixtures here too

PLACES = os.pathsep.join([str(ROOT / ".venv-infra" / "bin"), os.environ.get("PATH", "")])


def tool(name: str, *others: str) -> str:
    """The path of the first of these programs that is there. Without any the test is skipped, or, under `make check-infra`
    (which sets R1_CHECK_INFRA), fails.
    """
    for candidate in (name, *others):
        if (found := shutil.which(candidate, path=PLACES)) is not None:
            return found
    absent = f"{name} is not installed (`make check-infra` installs it)"
    if os.environ.get("R1_CHECK_INFRA"):
        pytest.fail(absent)
    pytest.skip(absent)


def check(*command: object, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a checking program; what it says is shown when it finds something."""
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done
