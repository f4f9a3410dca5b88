"""Whole stages on small models of architectures that cannot be packed, whose logits are scaled, or whose texts do not fit."""

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.contract.errors import UserError
from stages.engine import deepspeed_engine
from stages.kinds import curate, evaluate_model, rl, sft
from stages.problems.episode import Reward
from stages.problems.toy import SYMBOLS, VOCABULARY, save_toy_tokenizer
from stages.store.folders import StageFolder
from stages.store.stage import StageContext, StopRequest
from stages.tracking.journal import read
from tests.small_models import small_model

TOY = {"source": "toy", "count": 6, "operations_min": 1, "operations_max": 1}
ROWS = [("1+1=?", "2"), ("2+3=?", "5"), ("4+4=?", "8"), ("9+1=?", "10"), ("3+3=?", "6")]


def folder_of(folder: Path, family: str, **fields) -> Path:
    """A model folder of the family with the toy's tokenizer."""
    model = small_model(family, vocab_size=VOCABULARY, eos_token_id=SYMBOLS.index("<eos>"), **fields)
    model.save_pretrained(folder)
    save_toy_tokenizer(folder)
    return folder


def run(kind, path: Path, inputs: dict[str, Path], config: dict):
    folder = StageFolder(path)
    folder.path.mkdir(parents=True, exist_ok=True)
    settings = kind.config.model_validate({"kind": kind.name, **config})
    return kind.run(StageContext(settings, folder, inputs, dict.fromkeys(inputs, "d"), StopRequest()))


def run_sft(path: Path, model: Path, **config):
    data = path.parent / "data"
    data.mkdir()
    pq.write_table(pa.Table.from_pylist([{"prompt": p, "completion": c} for p, c in ROWS]), data / "train.parquet")
    return run(sft.KIND, path, {"model": model, "data": data}, {"model": "m", "data": "d", "batch": 5, "epochs": 2, **config})


def run_rl(path: Path, model: Path, **config):
    held_out = {**TOY, "count": 2, "split": "held_out"}
    fields = {"policy": "p", "problems": TOY, "held_out": held_out, "template": {"name": "question"}, "steps": 1}
    fields |= {"questions": 2, "samples": 4, "sampling": {"max_tokens": 8}, "evaluation": {"problems": 2, "samples": 1}}
    fields["rewards"] = {"verifier": "exact"}
    return run(rl.KIND, path, {"policy": model}, {**fields, **config})


def own_loss(model, tokenizer) -> float:
    """Mean loss in nats of the documents' answers by `model(input_ids).logits` of each alone."""
    losses = []
    for prompt, completion in ROWS:
        read_ids, learned = tokenizer(prompt).input_ids, [*tokenizer(completion).input_ids, SYMBOLS.index("<eos>")]
        ids = torch.tensor([[*read_ids, *learned]])
        with torch.no_grad():
            logp = model(ids).logits[0].log_softmax(-1)[-len(learned) - 1 : -1]
        losses += (-logp[range(len(learned)), learned]).tolist()
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize(
    ("family", "packed"),
    [("granite", True), ("cohere", True), ("gemma2", False)]
    + [(family, False) for family in ("lfm2", "qwen3_next", "granite_hybrid", "falcon", "mamba")],
)
def test_sft_loss_is_the_models_own_and_rows_are_announced(tmp_path, capsys, family, packed):
    folder = folder_of(tmp_path / "model", family)
    result = run_sft(tmp_path / "stage", folder)
    first, second = (line.metrics["train/loss"] for line in read(tmp_path / "stage" / "journal.jsonl"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert first == pytest.approx(own_loss(model, save_toy_tokenizer(tmp_path / "tokenizer")), abs=1e-5)
    assert second != first
    warning = f"warning: {type(model).__name__} "
    assert capsys.readouterr().err.count(warning) == (not packed)
    assert [remark.partition(": ")[2] for remark in result.remarks] == [
        "it is trained one text per row, which is slower" for _ in range(not packed)
    ]
    assert result.metrics["check/trained_logprob_difference"] <= 1e-4


@pytest.mark.parametrize("settings", [{}, {"algorithm": "ppo"}, {"kl": 0.1, "minibatches": 2}], ids=["grpo", "ppo", "kl"])
@pytest.mark.parametrize("family", ["lfm2", "mamba", "granite"])
def test_rl_trains_what_it_sampled(tmp_path, monkeypatch, family, settings):
    # A reward that differs from answer to answer, so that there is something to learn.
    monkeypatch.setattr("stages.rl.collect.score", scored_by_length)
    result = run_rl(tmp_path / "stage", folder_of(tmp_path / "model", family), **settings)
    (line,) = read(tmp_path / "stage" / "journal.jsonl")
    assert line.metrics["train/mismatch_max"] <= 1e-4
    assert line.metrics["train/grad_norm"] > 0
    assert result.metrics["check/trained_logprob_difference"] <= 1e-4
    assert result.metrics["check/sampled_logprob_difference"] <= 1e-4
    assert any("one text per row" in remark for remark in result.remarks) == (family != "granite")


def scored_by_length(_rewards, episodes, **_):
    for episode in episodes:
        total = float(len(episode.completion_ids) + episode.completion_ids[0])
        episode.reward = Reward(total=total, parts={"accuracy": 1.0, "format": 1.0}, verdict="right")


def nothing_computed(*_, **__):
    pytest.fail("something was computed")


@pytest.mark.parametrize("kind", ["rl", "curate", "evaluate_model"])
def test_answers_that_cannot_fit_the_positions_are_refused_before_anything_is_computed(tmp_path, monkeypatch, kind):
    folder = folder_of(tmp_path / "model", "gpt2", max_position_embeddings=48)
    monkeypatch.setattr("transformers.GPT2LMHeadModel.forward", nothing_computed)
    monkeypatch.setattr(deepspeed_engine.Engine, "__init__", nothing_computed)
    common = {"template": {"name": "question"}, "sampling": {"max_tokens": 64}}
    with pytest.raises(UserError, match=r"sampling.max_tokens: .* 64 more do not fit GPT2LMHeadModel's 48 positions") as error:
        if kind == "rl":
            run_rl(tmp_path / "stage", folder, sampling={"max_tokens": 64})
        elif kind == "curate":
            run(curate.KIND, tmp_path / "stage", {"sampler": folder}, {"sampler": "m", "problems": TOY, **common})
        else:
            run(evaluate_model.KIND, tmp_path / "stage", {"model": folder}, {"model": "m", "held_out": TOY, **common})
    assert "\n" not in str(error.value)


def test_documents_longer_than_the_positions_are_left_out(tmp_path):
    result = run_sft(tmp_path / "stage", folder_of(tmp_path / "model", "gpt2", max_position_embeddings=7))
    # 5 tokens of a prompt, 1 or 2 of an answer and the end: 7 or 8, the last of which is not computed.
    assert result.metrics["documents"] == 5
    assert result.remarks == []
    (tmp_path / "second").mkdir()
    result = run_sft(tmp_path / "second" / "stage", folder_of(tmp_path / "short", "gpt2", max_position_embeddings=6))
    assert result.metrics["documents"] == 4
    assert result.remarks == ["data: 1 of 5 documents left out, which are longer than 7 tokens"]


def test_sliding_window_model_learns_longer_documents_as_rows(tmp_path):
    folder = folder_of(tmp_path / "model", "mistral", sliding_window=6)
    run_sft(tmp_path / "stage", folder)
    first = read(tmp_path / "stage" / "journal.jsonl")[0].metrics["train/loss"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert first == pytest.approx(own_loss(model, save_toy_tokenizer(tmp_path / "tokenizer")), abs=1e-5)


def test_bidirectional_model_is_refused_before_training(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "model", "bert")
    monkeypatch.setattr(deepspeed_engine.Engine, "step", nothing_computed)
    with pytest.raises(UserError, match="`BertLMHeadModel` cannot be used"):
        run_sft(tmp_path / "stage", folder)
