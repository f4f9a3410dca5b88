"""vLLM's settings, and what becomes of a stage whose vLLM is missing, dies, hangs or talks nonsense. No vLLM is needed here."""

import contextlib
import json
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import psutil
import pytest
import torch
from pydantic import ValidationError

from stages.contract.config import semantic
from stages.contract.errors import StageFailed, UserError
from stages.engine import distributed
from stages.problems.toy import save_toy_tokenizer
from stages.recipe.resolve import load_recipe
from stages.rl import weight_sync
from stages.rollout.decoding.token_sampling import derived_seed
from stages.rollout.engines import open_rollout
from stages.rollout.protocol import Request, Sampling
from stages.rollout.settings import RolloutSettings
from stages.rollout.torch_engine import load_tokenizer
from stages.rollout.vllm import worker
from stages.rollout.vllm.client import VllmProcess
from stages.rollout.vllm.engine import VllmRollout, _environment
from stages.rollout.vllm.weight_broadcast import WeightsGroup, described, distinct
from stages.runtime import heartbeat
from stages.store.folders import StageFolder
from tests.conftest import ROOT, tiny_llama

FAKE = ROOT / "tests" / "doubles" / "fake_vllm.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("model")
    model = tiny_llama().float()
    model.generation_config.eos_token_id = [1, 9]
    model.save_pretrained(found)
    save_toy_tokenizer(found)
    return found


@contextlib.contextmanager
def process(manner, log, **limits):
    with VllmProcess([sys.executable, str(FAKE), manner], log, **{"start_s": 60.0, "silence_s": 60.0} | limits) as found:
        yield found
    assert found._process.returncode is not None


def fake(path, manner="well"):
    """A file that can be run in place of vLLM's interpreter."""
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@" {manner}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return RolloutSettings(engine="vllm", vllm_python=str(path))


def test_only_the_engine_is_part_of_the_result():
    settings = RolloutSettings(vllm_python="x", memory_share=0.5, sleep=True, silence_s=1, tokens=9)
    assert semantic(settings) == {"engine": "torch"}
    with pytest.raises(ValidationError):
        RolloutSettings(memory_share=1.0)


def test_the_engine_reaches_every_stage_that_samples_and_turns_the_correction_on():
    recipe = load_recipe(ROOT / "configs/quickstart.yaml", ["shared.rollout.engine=vllm", "stages.zero.importance_cap=null"])
    stages = recipe.stages
    assert {name for name in stages if getattr(stages[name], "rollout", None) is not None} == {
        *("zero", "reasoning", "cold_start_data"),
        *(f"evaluation.{name}" for name in ("base", "zero", "cold_start", "reasoning")),
    }
    assert all(getattr(stage, "rollout", RolloutSettings(engine="vllm")).engine == "vllm" for stage in stages.values())
    assert stages["reasoning"].importance_cap == 2.0
    assert stages["zero"].importance_cap is None, "what a recipe sets itself stands"
    assert load_recipe(ROOT / "configs/quickstart.yaml").stages["reasoning"].importance_cap is None


@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_the_settings_choose_the_engine(tmp_path, folder, engine):
    settings = fake(tmp_path / "python").model_copy(update={"engine": engine})
    with open_rollout(settings, folder, "cpu", tmp_path / "log.txt") as rollout:
        assert isinstance(rollout, VllmRollout) == (engine == "vllm")
        (answers,) = rollout.sample([Request("a", (6, 7), 2)], Sampling(max_tokens=4), seed=0, purpose="t", step=0)
    assert len(answers) == 2


def test_answers_go_to_their_requests(tmp_path, folder, monkeypatch):
    progress = []
    monkeypatch.setattr(heartbeat, "progress", lambda: progress.append(1))
    requests = [Request("a", (6, 7), 2), Request("b", (8,), 1, first_sample=3)]
    with VllmRollout(
        folder, load_tokenizer(folder), fake(tmp_path / "python"), device="cpu", log=tmp_path / "log.txt"
    ) as rollout:
        assert rollout.end_tokens == {1, 9}
        asked = []
        ask = rollout._process.ask
        monkeypatch.setattr(rollout._process, "ask", lambda request: asked.append(request) or ask(request))
        answers = rollout.sample(requests, Sampling(max_tokens=9, stop=("+",)), seed=5, purpose="t", step=2)
        assert rollout.encode("0*0") == (6, 21, 6)
    assert [[c.ids for c in request] for request in answers] == [[[6, 1, 9], [7, 1, 9]], [[6, 1, 9]]]
    assert [c.text for c in answers[0]] == ["03", "13"], "the end token stays out of the text, a digit does not"
    assert asked[0]["prompts"][1] == {"ids": (8,), "seeds": [derived_seed(5, "t", 2, "b", 3)]}
    assert (asked[0]["stop"], asked[0]["max_tokens"]) == (["+"], 9)
    assert len(progress) >= 6


@pytest.mark.parametrize(
    ("prompt", "sampling", "says"),
    [
        ((), Sampling(max_tokens=4), "template: the prompt of `a` is empty"),
        ((6,) * 17, Sampling(max_tokens=4), "prompt and answer may have 21 tokens, vLLM was given room for 20"),
        ((6,), Sampling(temperature=0.001, max_tokens=4), "sampling.temperature: vLLM does not draw at 0.001"),
    ],
)
def test_what_vllm_cannot_sample_is_refused(tmp_path, folder, prompt, sampling, says):
    with (
        VllmRollout(
            folder, load_tokenizer(folder), fake(tmp_path / "python"), device="cpu", log=tmp_path / "log.txt"
        ) as rollout,
        pytest.raises(UserError, match=says),
    ):
        rollout.sample([Request("a", prompt, 1)], sampling, seed=0, purpose="t", step=0)


@pytest.mark.parametrize("kind", ["missing", "not a program", "without vllm"])
def test_an_interpreter_that_is_none_is_one_line_with_the_mend(tmp_path, folder, kind):
    path = tmp_path / "python"
    settings = RolloutSettings(engine="vllm", vllm_python=str(path))
    if kind == "not a program":
        path.write_text("print(1)")
    elif kind == "without vllm":
        settings = fake(path, "unfit")
    with pytest.raises(UserError) as caught, open_rollout(settings, folder, "cpu", tmp_path / "log.txt") as rollout:
        rollout.sample([Request("a", (6,), 1)], Sampling(max_tokens=4), seed=0, purpose="t", step=0)
    assert str(caught.value).startswith(f"{path}: vLLM")
    assert "run `make vllm`" in caught.value.mend


@pytest.mark.parametrize(
    ("manner", "says"),
    [
        ("dies", r"vLLM's process ended \(status 7\); its last lines: first \| RuntimeError: boom; all of them: .*log.txt"),
        ("killed", r"vLLM's process ended \(status -9\); its last lines: none"),
        ("garbage", "vLLM's process said `Segmentation .*`, which is no reply"),
        ("hangs", r"vLLM said nothing for 1 s \(rollout.silence_s\)"),
        ("silent", r"vLLM said nothing for 1 s \(rollout.start_s\)"),
        ("deaf", r"vLLM took no request for 1 s \(rollout.silence_s\)"),
    ],
)
def test_a_process_that_fails_is_told_of_and_ended(tmp_path, manner, says):
    limits = {"hangs": {"silence_s": 1.0}, "silent": {"start_s": 1.0}, "deaf": {"silence_s": 1.0}}.get(manner, {})
    with process(manner, tmp_path / "log.txt", **limits) as client:
        started = time.monotonic()
        with pytest.raises(StageFailed, match=says):
            list(client.ask({"do": "nothing", "text": "x" * 300_000}))  # more than a pipe holds
        assert time.monotonic() - started < 30
        assert not psutil.pid_exists(client._process.pid)


class Policy:
    """What `follow_policy` needs of the trainer's engine."""

    device = torch.device("cpu")
    model = SimpleNamespace(dtype=torch.float32)
    saved: ClassVar[list[Path]] = []

    @contextlib.contextmanager
    def whole_weights(self):
        yield torch.nn.Linear(10, 10)

    def save_model(self, place, tokenizer, main, *, merge):
        assert main
        place.mkdir()  # nothing of an earlier one is in its place
        (place / "model.safetensors").write_text("weights")
        self.saved.append(place)


@pytest.mark.parametrize("room", [True, False])
def test_weights_go_through_shared_memory_or_the_stages_folder_and_leave_nothing(tmp_path, folder, monkeypatch, room):
    distributed.join("cpu")
    shared, stage = tmp_path / "shm", StageFolder(tmp_path / "stage")
    shared.mkdir()
    stage.path.mkdir()
    monkeypatch.setattr(weight_sync, "SHARED_MEMORY", shared)
    monkeypatch.setattr(weight_sync, "ROOM", 1.2 if room else 1e18)
    policy = Policy()
    policy.saved.clear()
    settings = fake(tmp_path / "python")
    with weight_sync.follow_policy(settings, policy, load_tokenizer(folder), folder, stage) as follower:
        assert isinstance(follower.fresh(), VllmRollout)
        (place,) = policy.saved
        assert place.parent == (shared if room else stage.path)
        assert not place.exists()
        place.mkdir()  # as an attempt that was killed in between leaves it
        (place / "old").touch()
        follower.fresh()
        follower.rest()
    assert policy.saved == [place, place]
    assert [path.name for path in stage.path.iterdir()] == ["vllm-rank0.log"]
    assert not list(shared.iterdir())


def test_a_process_that_does_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.rollout.vllm.client.END_S", 0.2)
    with process("stays", tmp_path / "log.txt") as client:
        client.ready()
    assert client._process.returncode == -9
    assert not psutil.pid_exists(client._process.pid)


@pytest.mark.parametrize(("own", "visible", "given"), [(False, "4,5,6,7", "5"), (True, "4,5,6,7", "7"), (True, "", "3")])
def test_the_gpu_of_a_ranks_vllm(monkeypatch, own, visible, given):
    for name, value in {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": visible}.items():
        monkeypatch.setenv(name, value)
    assert _environment("cuda", own_gpu=own)["CUDA_VISIBLE_DEVICES"] == given
    assert "LOCAL_RANK" not in _environment("cuda", own_gpu=own)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    with pytest.raises(UserError, match="3 GPUs are visible, this rank's vLLM wants number 3"):
        _environment("cuda", own_gpu=True)


def test_two_ends_on_one_gpu_are_refused(tmp_path, folder):
    policy = Policy()
    policy.device = torch.device("cuda")
    settings = fake(tmp_path / "python").model_copy(update={"weights": "broadcast"})
    with (
        pytest.raises(UserError, match=r"rollout\.weights: NCCL does not join two processes on one GPU"),
        weight_sync.follow_policy(settings, policy, load_tokenizer(folder), folder, StageFolder(tmp_path)),
    ):
        pass


class Worker:
    """What vLLM's end needs of a vLLM worker."""

    device = torch.device("cpu")

    def reload_weights(self, weights_iterator):
        self.weights = dict(weights_iterator)


def test_weights_go_from_memory_to_memory():
    head = torch.randn(5, 3)
    parameter = torch.nn.Parameter(torch.randn(4, 2))
    given = [("embedding", head), ("head", head), ("half", torch.randn(7).bfloat16()), ("row", torch.randn(6, 4).t()[1:])]
    given += [("trained", parameter), ("count", torch.tensor(3))]
    end, other = Worker(), ThreadPoolExecutor(1)
    group = WeightsGroup(torch.device("cpu"), 30.0, lambda file: other.submit(worker._join, end, str(file), 30.0))
    sent = distinct(given)
    for _ in range(2):
        arrived = other.submit(worker._receive, end, json.loads(json.dumps(described(sent))))
        group.send(sent)
        arrived.result(timeout=30)
        # A tied head is sent once.
        assert list(end.weights) == ["embedding", "half", "row", "trained", "count"]
        for name, tensor in sent:
            assert end.weights[name].dtype == tensor.dtype
            assert torch.equal(end.weights[name], tensor)
        with torch.no_grad():
            parameter.add_(1)


def test_an_end_that_stays_away_is_not_waited_for_for_ever():
    with pytest.raises(RuntimeError):
        WeightsGroup(torch.device("cpu"), 0.5, lambda _: None)
