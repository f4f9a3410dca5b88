"""Threads of a rank use the rank's GPU. The current CUDA device belongs to a thread, and a new thread's is GPU 0."""

import ast
import threading
from types import SimpleNamespace

import pytest
import torch

from stages.engine import distributed
from stages.problems.episode import Problem
from stages.rewards import preference
from stages.rl import collect as collecting
from stages.rl.one_step_off import Ahead
from stages.rl.problem_sampler import ProblemSampler
from tests.conftest import ROOT
from tests.rl.test_collect import Scripted, scene

GPU = torch.device("cuda", 3)
PROBLEMS = [Problem(id=str(n), question=f"right {n}", answer="a", source="s") for n in range(2)]


@pytest.fixture
def devices(monkeypatch):
    """Thread -> device that it has set, as torch.cuda keeps it."""
    distributed.join("cpu")
    current = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.__setitem__(threading.get_ident(), device))
    return current


@pytest.fixture
def used(devices, monkeypatch):
    """The device of each thread that samples and of each that judges, while it does."""
    seen = {"sample": [], "score": []}
    real_score, real_sample = collecting.score, Scripted.sample

    def score(*arguments, **options):
        seen["score"].append(devices.get(threading.get_ident()))
        return real_score(*arguments, **options)

    def sample(self, *arguments, **options):
        seen["sample"].append(devices.get(threading.get_ident()))
        return real_sample(self, *arguments, **options)

    monkeypatch.setattr(collecting, "score", score)
    monkeypatch.setattr(Scripted, "sample", sample)
    return seen


def test_answers_are_judged_on_the_ranks_gpu(used):
    place = scene(Scripted())
    place.device = GPU
    place.sample(PROBLEMS, 2, "train", 0)
    assert used["score"] == [GPU, GPU]


def test_a_rollout_ahead_is_sampled_and_judged_on_the_ranks_gpu(used):
    place = scene(Scripted())
    place.device = GPU
    ahead = Ahead(place, ProblemSampler(PROBLEMS, 2, 0), 2, 2)
    ahead.take(0, 0)
    ahead.end()
    assert used == {"sample": [GPU], "score": [GPU, GPU]}


def test_a_cpus_threads_set_no_device(used, devices):
    scene(Scripted()).sample(PROBLEMS, 2, "train", 0)
    assert devices == {}


@pytest.mark.parametrize(
    ("asked", "gpus", "expected"), [("auto", True, "cuda:2"), ("cuda", True, "cuda:2"), ("auto", False, "cpu")]
)
def test_a_preference_model_is_put_on_the_ranks_gpu(tmp_path, monkeypatch, asked, gpus, expected):
    import transformers

    placed = []
    model = SimpleNamespace(config=SimpleNamespace(num_labels=1, pad_token_id=0))
    model.to = lambda device: placed.append(torch.device(device)) or model
    model.eval = lambda: model
    monkeypatch.setattr(
        transformers.AutoModelForSequenceClassification, "from_pretrained", lambda *_, **__: (model, {"missing_keys": []})
    )
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: SimpleNamespace(pad_token="x"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", "2")
    (tmp_path / "config.json").write_text("{}")
    preference._loaded.cache_clear()
    preference._loaded(str(tmp_path), asked)
    preference._loaded.cache_clear()
    assert placed == [torch.device(expected)]


def test_every_pool_of_threads_of_a_trainer_binds_them_to_its_device():
    calls = [
        (file.name, {keyword.arg for keyword in node.keywords})
        for file in sorted((ROOT / "stages" / "rl").glob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("ThreadPoolExecutor", "Thread")
    ]
    assert {name for name, _ in calls} == {"one_step_off.py", "collect.py"}
    assert all("initializer" in keywords for _, keywords in calls)
