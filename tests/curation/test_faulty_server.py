"""The stage `curate` rewrites through a real server (`transformers serve`, it needs `openai`) behind a proxy that fails."""

import json
import shutil
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stages.store.files import digest_path
from stages.tracking.journal import read
from tests.curation.test_serve import serving
from tests.doubles.faulty_proxy import FAULTS, FaultyProxy
from tests.kinds.test_curate import dataset, run_on

pytestmark = pytest.mark.slow

PIECES = ["<think>", "I ", "add ", "both, ", "which ", "gives ", "it.", "</think>\n", "<answer>", "3", "</answer>"]
REPLY = "".join(PIECES)
"""All that the model says, whatever it is asked, a token each."""
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}|"
QUESTIONS = ["0+3", "3+0", "1+2", "2+1", "1+1+1", "4-1", "5-2", "6-3"]
SCHEDULE = [(), ("500",), ("silent",), ("cut",), ("stalled",), ("500", "cut", "500"), ("cut", "silent"), ("500", "500", "500")]
"""Faults of each question, in the order of its requests."""
TIMEOUT_S = 6.0


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """Where a model is served whose next token depends on the last one alone."""
    folder = tmp_path_factory.mktemp("fixed")
    words = ["<pad>", "<eos>", "|", *PIECES]
    tokenizer = Tokenizer(models.WordLevel({text: i for i, text in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<pad>")
    wrapped.chat_template = CHAT
    wrapped.save_pretrained(folder / "model")
    size = len(words)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    names = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, num_hidden_layers=1, tie_word_embeddings=False, **shape, **names))
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, 16))
        following = [1, 1, *range(3, size), 1]
        model.lm_head.weight.zero_()
        for last, after in enumerate(following):
            model.lm_head.weight[after, last] = 20.0
    model.save_pretrained(folder / "model")
    with serving(folder / "model", folder / "log.txt") as found:
        yield found, str(folder / "model")


@pytest.mark.parametrize("stream", [False, True])
def test_every_document_is_rewritten_once_through_faults(port, tmp_path, monkeypatch, stream):
    number, model = port
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"question": q, "answer": "3"}) + "\n" for q in QUESTIONS))
    texts = {q: ["1</think><answer>3</answer>"] for q in QUESTIONS}
    asked = {q: f"Question:\n{q}\n\nSolution:\n<think>{texts[q][0]}" for q in QUESTIONS}
    schedule = dict(zip(asked.values(), SCHEDULE, strict=True))
    assert {fault for faults in SCHEDULE for fault in faults} == set(FAULTS)
    endpoint = {"model": model, "max_tokens": 32, "temperature": 1.0, "stream": stream, "timeout_s": TIMEOUT_S}
    endpoint |= {"attempts": 4, "wait_s": 0.05, "concurrency": 3}

    def curate(proxy):
        return run_on(
            tmp_path / "stage", monkeypatch, texts, samples=1, problems={"source": "file", "path": str(problems)},
            rewards={"verifier": "exact"}, filters={"min_language": 0},
            rewrite={"endpoint": {**endpoint, "url": proxy.url}, "instruction": "Anew."},
        )  # fmt: skip

    with FaultyProxy(number, schedule) as proxy:
        result, _ = curate(proxy)
        assert proxy.seen == {text: [*faults, "passed"] for text, faults in schedule.items()}
        rows = dataset(tmp_path / "stage")
        assert [row["question"] for row in rows] == QUESTIONS
        for row in rows:
            assert (row["completion"], row["rewritten"]) == (REPLY.removeprefix("<think>"), True)  # it stands in the prompt
        assert result.metrics["kept"] == len(QUESTIONS)
        ledgers = {name: lines(tmp_path / "stage" / "rewrites" / f"{name}.jsonl") for name in ("replies", "judged")}
        for name, documents in ledgers.items():
            assert set(Counter(document["key"] for document in documents).values()) == {1}, name
            assert len(documents) == len(QUESTIONS), name
        assert {document["document"]["text"] for document in ledgers["replies"]} == {REPLY}

        # Again, with all that comes after the replies to be done anew: no request.
        before = digest_path(tmp_path / "stage" / "dataset")
        shutil.rmtree(tmp_path / "stage" / "dataset")
        journal = tmp_path / "stage" / "journal.jsonl"
        steps = len(list(read(journal)))
        journal.unlink()
        proxy.seen.clear()
        curate(proxy)
        assert proxy.seen == {}
        assert digest_path(tmp_path / "stage" / "dataset") == before
        assert len(list(read(journal))) == steps
        assert lines(tmp_path / "stage" / "rewrites" / "replies.jsonl") == ledgers["replies"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
