"""The same update under ZeRO 0, 1, 2 and 3, on one process and on two, for every cut into micro-batches."""

import os
import random
import subprocess
import sys

import pytest
import torch

from stages.problems.episode import Episode, Group, Problem, Reward
from stages.rollout.records import write_groups
from tests.conftest import ROOT, tiny_llama

# ZeRO stage : tokens of a row : tokens of a micro-batch : minibatches : groups.
# Rows of 24 tokens give the ranks unequal numbers of micro-batches; one group in one row leaves the second rank without any.
CASES = [
    "zero0:24:48:1:5",
    "zero1:24:48:1:5",
    "zero2:24:48:1:5",
    "zero3:24:48:1:5",
    "zero2:24:1000:1:5",
    "zero0:24:48:3:5",
    "zero2:24:48:3:5",
    "zero3:24:48:3:5",
    "zero2:200:1000:1:1",
    "zero3:200:1000:1:1",
]


def recorded_groups():
    rng, groups = random.Random(0), []
    for number in range(5):
        problem = Problem(id=f"p{number}", question="q", answer="a", source="s")
        group = Group(problem)
        prompt = [rng.randrange(2, 32) for _ in range(rng.randrange(2, 6))]
        for sample in range(4):
            completion = [rng.randrange(2, 32) for _ in range(rng.randrange(1, 9))]
            group.episodes.append(
                Episode(
                    problem=problem,
                    sample=sample,
                    prompt="",
                    prompt_ids=prompt,
                    completion_ids=completion,
                    logprobs=[-1.0] * len(completion),
                    text="",
                    finish="stop",
                    reward=Reward(total=rng.random(), parts={}, verdict="right"),
                )
            )
        groups.append(group)
    return groups


def run(folder, processes, cases):
    output = folder / f"world{processes}"
    output.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-m", "tests.pipeline.zero_updates", str(folder / "groups.parquet"), str(output), *cases],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {case: torch.load(output / f"{case.replace(':', '-')}.pt") for case in cases}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    write_groups(folder / "groups.parquet", recorded_groups())
    return {1: run(folder, 1, ["zero0:8:99999:1:5", "zero0:8:99999:3:5", "zero0:8:99999:1:1"]), 2: run(folder, 2, CASES)}


@pytest.mark.parametrize("case", CASES)
def test_every_zero_stage_makes_the_same_update(results, case):
    start = torch.cat([p.detach().flatten() for p in tiny_llama().float().parameters()])
    reference = results[1][f"zero0:8:99999:{':'.join(case.split(':')[3:])}"]
    found = results[2][case]
    moved = torch.linalg.norm(reference["weights"] - start)
    assert moved > 0.01
    assert torch.linalg.norm(found["weights"] - reference["weights"]) / moved <= 1e-3
    for mine, theirs in zip(found["stats"], reference["stats"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert mine["tokens"] == theirs["tokens"]


def test_minibatches_after_the_first_are_off_policy(results):
    ratios_clipped = [s["clipped_low"] + s["clipped_high"] for s in results[2]["zero2:24:48:3:5"]["stats"]]
    assert ratios_clipped[0] == 0
    assert max(ratios_clipped) > 0
