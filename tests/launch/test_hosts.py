"""A stage on two machines, which are network namespaces with addresses of their own: one rank each, under ZeRO-3."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.engine.checkpoint.checkpointer import steps
from stages.recipe.resolve import load_recipe
from stages.store.files import digest_files
from stages.tracking.journal import read
from tests import stage_process
from tests.conftest import ROOT
from tests.launch.machines import ADDRESSES, PORT, Machines, two_machines
from tests.stage_process import finish, said, wait_for_steps

pytestmark = pytest.mark.slow
STEPS = 8
FROZEN_S = 20
"""Seconds after which a machine that is silent counts as gone."""
BOUND_S = FROZEN_S + 15
"""Within so many seconds of a cut both sides must have ended."""
COMPUTE = f"{{hosts: 2, processes: 1, rendezvous: '{ADDRESSES[0]}:{PORT}', threads: 1, frozen_s: {FROZEN_S}, join_s: 300}}"
REASONING = [
    f"stages.reasoning.steps={STEPS}",
    "stages.reasoning.deepspeed=zero3",
    "stages.reasoning.kl=0.01",
    "stages.reasoning.lr=1e-3",
    "stages.reasoning.checkpoints.every=2",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small recipe's base model."""
    config = load_recipe(ROOT / "tests/pipeline/tiny.yaml").stages["base"]
    folder = stage_process.prepare(tmp_path_factory.mktemp("base") / "stage", config, {})
    return finish(folder, timeout=1200) / "model"


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with two_machines() as made:
        yield made


def prepare(folder: Path, base: Path, compute: str = COMPUTE) -> Path:
    """The reasoning stage, on two machines."""
    recipe = load_recipe(ROOT / "tests/pipeline/tiny.yaml", [*REASONING, f"stages.reasoning.compute={compute}"])
    return stage_process.prepare(folder, recipe.stages["reasoning"], {"policy": base})


def started(machines: Machines, folder: Path, second: Path | None = None) -> list[subprocess.Popen[bytes]]:
    """Both machines' parts; `second`: the other one's own folder of the stage."""
    return [
        machines.join(0, folder, log=folder / "log.txt"),
        machines.join(1, second or folder, log=(second or folder) / "second.txt"),
    ]


def ended(processes: list[subprocess.Popen[bytes]], timeout: float) -> list[int]:
    """How both ended, which they have to within the time."""
    until = time.monotonic() + timeout
    try:
        return [process.wait(max(0.1, until - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


def complete(machines: Machines, folder: Path, second: Path | None = None) -> None:
    """Run the stage on both machines to its end."""
    assert ended(started(machines, folder, second), 900) == [0, 0], said(folder)


def results(folder: Path) -> dict[str, Any]:
    """What has to be the same to the bit."""
    curves = [
        (x.step, {k: v for k, v in x.metrics.items() if not k.startswith("time/")}) for x in read(folder / "journal.jsonl")
    ]
    return {"model": digest_files(folder / "model"), "rollouts": digest_files(folder / "rollouts"), "curves": curves}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, machines: Machines, base: Path) -> Path:
    """The stage, uninterrupted on two machines."""
    folder = prepare(tmp_path_factory.mktemp("whole") / "stage", base)
    complete(machines, folder)
    return folder


def test_two_machines_complete_as_two_ranks_of_one_do(tmp_path: Path, whole: Path, base: Path) -> None:
    assert [line.step for line in read(whole / "journal.jsonl")] == list(range(1, STEPS + 1))
    assert digest_files(whole / "model")["model.safetensors"] != digest_files(base)["model.safetensors"]
    assert max(line.metrics["train/grad_norm"] for line in read(whole / "journal.jsonl")) > 0
    one = finish(prepare(tmp_path / "one", base, "{hosts: 1, processes: 2, threads: 1}"), 2)
    assert results(one) == results(whole)


def test_a_cut_ends_both_sides_and_the_resumed_run_gives_the_same_bits(
    tmp_path: Path, machines: Machines, whole: Path, base: Path
) -> None:
    folder = prepare(tmp_path / "cut", base)
    processes = started(machines, folder)
    wait_for_steps(folder, processes[0], 3)
    machines.cable("down")
    cut = time.monotonic()
    try:
        assert ended(processes, BOUND_S) == [3, 3], said(folder)
        took = time.monotonic() - cut
    finally:
        machines.cable("up")
    print(f"both sides ended {took:.1f} s after the cut, with a bound of {BOUND_S} s")
    assert "machine 1" in said(folder)
    assert "has given no sign of life" in said(folder)
    assert "the first machine (192.0.2.1) has not answered" in (folder / "second.txt").read_text()
    outcome = json.loads((folder / "attempts/1/outcome.json").read_text())
    assert outcome["status"] == "failed"
    assert not (folder / "manifest.json").exists()
    before = max(steps(folder / "checkpoints"))
    assert 0 < before < STEPS
    complete(machines, folder)
    assert results(folder) == results(whole)
    digests = [json.loads((f / "manifest.json").read_text())["digest"] for f in (folder, whole)]
    assert digests[0] == digests[1]


def test_a_machine_with_a_folder_of_its_own_needs_its_inputs_and_gives_the_same_bits(
    tmp_path: Path, machines: Machines, whole: Path, base: Path
) -> None:
    folder = prepare(tmp_path / "first", base)
    second = tmp_path / "second"
    second.mkdir()
    record = json.loads((folder / "config.json").read_text())
    record["inputs"]["policy"]["path"] = str(copied := tmp_path / "base")
    (second / "config.json").write_text(json.dumps(record))
    assert ended(started(machines, folder, second), 600) == [2, 2]
    assert "the input `policy` is missing on this machine" in said(folder)

    shutil.copytree(base, copied)
    with (copied / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert ended(started(machines, folder, second), 600) == [2, 2]
    assert "the input `policy` is not what the first machine has" in said(folder)

    shutil.copy(base / "model.safetensors", copied)
    processes = started(machines, folder, second)
    wait_for_steps(folder, processes[0], 3)
    processes[1].terminate()  # whichever machine is asked, all stop
    assert ended(processes, 120) == [75, 75]
    assert not (second / "checkpoints").exists()
    complete(machines, folder, second)
    assert results(folder) == results(whole)
    assert sorted(path.name for path in second.iterdir()) == ["config.json", "hosts", "second.txt"]
