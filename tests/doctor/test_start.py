"""What every run needs of the machine, each lack simulated: one line, with which `r1 run` ends before it computes anything."""

import argparse
import importlib.metadata
import shutil
import socket
import tempfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from flows.doctor import start
from flows.doctor.checks import demand
from flows.doctor.finding import Finding
from flows.doctor.scope import Scope
from flows.doctor.start import examine_start
from flows.runs.selection import select
from stages.contract.errors import UserError
from stages.recipe.resolve import ResolvedRecipe, load_recipe
from stages.runtime import platform
from tests.conftest import ROOT

GIB = 1 << 30


@pytest.fixture
def quickstart(tmp_path: Path) -> ResolvedRecipe:
    return load_recipe(str(ROOT / "configs" / "quickstart.yaml"), [f"runs={tmp_path / 'runs'}"])


def refused(recipe: ResolvedRecipe) -> str:
    """The line that ends `r1 run`; it leaves no folder."""
    with pytest.raises(UserError) as raised:
        demand(recipe, select(recipe), argparse.Namespace(config="quickstart.yaml", no_code=False))
    assert not recipe.runs.exists()
    return str(raised.value)


def found(recipe: ResolvedRecipe) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine_start(Scope(recipe, recipe.stages, {}))}


def test_machine_with_everything_has_no_finding_but_ok(quickstart, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GIB))
    assert {check: finding.state for check, finding in found(quickstart).items()} == dict.fromkeys(
        ("memory", "temporary folder", "loopback", "C++ compiler"), "ok"
    )


@pytest.mark.parametrize(("free", "state"), [(0.9, "fail"), (1.5, "warn"), (2.5, "ok")])
def test_memory_below_what_a_run_holds_is_refused(quickstart, monkeypatch, free, state):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free * GIB))
    assert found(quickstart)["memory"].state == state
    if state == "fail":
        assert refused(quickstart) == "memory: 0.9 GiB are free, a run needs 1 and more; end other programs"


def test_memory_limit_of_a_container_counts(quickstart, monkeypatch):
    monkeypatch.setattr(start, "memory_limit", lambda: GIB // 2)
    assert refused(quickstart).startswith("memory: 0.5 GiB are free")


def test_full_disk_is_refused(quickstart, monkeypatch):
    usage = shutil.disk_usage(ROOT)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=GIB // 4))
    assert refused(quickstart).startswith(f"disk: 0.25 GiB are free for {quickstart.runs}, a run needs 0.5 and more; `r1 gc`")


def test_missing_loopback_is_refused(quickstart, monkeypatch):
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth0": [SimpleNamespace(address="10.0.0.2")]})
    assert refused(quickstart).startswith("loopback: no network interface has the address 127.0.0.1; bring loopback up")


def test_port_that_cannot_be_opened_is_refused(quickstart, monkeypatch):
    def refuse(_address):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "create_server", refuse)
    assert refused(quickstart).startswith("loopback: no port of 127.0.0.1 can be opened (Permission denied)")


def test_temporary_folder_that_cannot_be_written_is_refused(quickstart, monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    what = "temporary folder: no file can be written there (No space left on device); make room, or set TMPDIR"
    assert refused(quickstart).startswith(what)


def test_missing_package_is_refused(quickstart, monkeypatch):
    version = importlib.metadata.version

    def without_prefect(name):
        if name == "prefect":
            raise importlib.metadata.PackageNotFoundError
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_prefect)
    assert refused(quickstart) == "prefect: missing; run `make setup`"


def test_package_too_new_for_the_server_is_refused(quickstart, monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.155.0" if name == "fastapi" else version(name))
    assert refused(quickstart).startswith("fastapi: 0.155.0; pip install 'fastapi>=0.139,<0.151'")


def test_missing_compiler_is_a_warning(quickstart, monkeypatch):
    monkeypatch.setenv("CXX", "/none")
    assert found(quickstart)["C++ compiler"].state == "warn"


def test_nothing_is_demanded_when_every_stage_is_reused(quickstart, monkeypatch):
    monkeypatch.setattr(platform, "loopback_interface", lambda: None)
    assert list(examine_start(Scope(quickstart, {}, {}))) == []
