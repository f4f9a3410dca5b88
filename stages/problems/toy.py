"""The toy: chains of + and * modulo 7, a language with two scripts, and a base model's documents about them.

A question is `4*3+2*6=?`, read from left to right. One pass of a small model cannot do it; step by step is easy. Thinking comes
in two scripts, digits (`4*3=5,5+2=0`) and the letters a-g for 0-6 (`e*d=f,f+c=a`); the answer is always in digits. So a policy
that is rewarded for accuracy alone may think in either script, or mix them, as R1-Zero mixed languages.
"""

import hashlib
import random
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.contract.config import ADDED, Config
from stages.problems.episode import Problem, ProblemVerifier

MODULUS = 7
DIGITS = "0123456"
LETTERS = "abcdefg"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
PAD, END = "<pad>", "<eos>"
SYMBOLS = (PAD, END, *TAGS, *DIGITS, *LETTERS, "+", "*", "=", ",", "?")
VOCABULARY = 32
"""Size of the vocabulary; the places after the symbols stay empty."""


class Chains(Config):
    """How long the chains are."""

    operations_min: int = Field(default=3, ge=1)
    """Fewest operations of a chain."""
    operations_max: int = Field(default=6, ge=1)
    """Most operations of a chain."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.operations_min > self.operations_max:
            raise ValueError("operations_min is larger than operations_max")
        return self


class ToySource(Chains):
    """Chains of + and * modulo 7, made as they are asked for."""

    source: Literal["toy"]
    """Which source this is."""
    count: int = Field(ge=1)
    """Number of problems."""
    split: Literal["train", "held_out"] = "train"
    """The two splits never share a question."""
    seed: int = Field(default=0, ge=0)
    """Which problems are drawn."""
    verifier: Annotated[ProblemVerifier | None, ADDED] = None
    """As of every source: what judges the answers; null: the stage's `rewards.verifier`."""


class ToyDocuments(Chains):
    """What the base model has read, as shares. The defaults make a base that reasons sometimes and mixes scripts."""

    answer_at_once: float = Field(default=0.42, ge=0, le=1)
    """Documents that answer without thinking; their answer is mostly wrong."""
    flawed: float = Field(default=0.15, ge=0, le=1)
    """Documents whose thinking skips a step or gets one wrong. The rest thinks step by step without a flaw."""
    at_once_right: float = Field(default=0.15, ge=0, le=1)
    """Share of right answers among those given at once."""
    digits: float = Field(default=0.45, ge=0, le=1)
    """Share of the step-by-step documents written in digits throughout."""
    letters: float = Field(default=0.20, ge=0, le=1)
    """Share of them written in letters throughout; the rest switches midway."""
    malformed: float = Field(default=0.10, ge=0, le=1)
    """Share of all documents with a missing, doubled or misplaced tag."""


def _apply(left: int, operation: str, right: int) -> int:
    return (left * right if operation == "*" else left + right) % MODULUS


def _chain(rng: random.Random, fewest: int, most: int) -> tuple[list[int], list[str]]:
    count = rng.randint(fewest, most)
    return [rng.randrange(MODULUS) for _ in range(count + 1)], [rng.choice("+*") for _ in range(count)]


def _question(numbers: list[int], operations: list[str]) -> str:
    return "".join(f"{n}{o}" for n, o in zip(numbers, [*operations, "=?"], strict=True))


def _held_out(question: str) -> bool:
    """A fifth of all questions, by hash, is never trained on."""
    return hashlib.sha256(question.encode()).digest()[0] < 51


def _draw(rng: random.Random, fewest: int, most: int, *, held_out: bool) -> tuple[str, list[int], list[str]]:
    while True:
        numbers, operations = _chain(rng, fewest, most)
        question = _question(numbers, operations)
        if _held_out(question) == held_out:
            return question, numbers, operations


def toy_problems(source: ToySource) -> list[Problem]:
    """The problems of a source, all different.

    Raises ValueError when there are not so many different ones.
    """
    rng = random.Random(f"toy-problems-{source.split}-{source.seed}")
    problems: dict[str, Problem] = {}
    for _ in range(100 * source.count):
        if len(problems) == source.count:
            break
        question, numbers, operations = _draw(
            rng, source.operations_min, source.operations_max, held_out=source.split == "held_out"
        )
        value = numbers[0]
        for operation, number in zip(operations, numbers[1:], strict=True):
            value = _apply(value, operation, number)
        problems.setdefault(question, Problem(f"toy:{question}", question, str(value), f"toy {source.split}"))
    if len(problems) < source.count:
        raise ValueError(f"there are only about {len(problems)} different toy problems of this length")
    return list(problems.values())


def _in_script(text: str, letters: bool) -> str:
    return text.translate(str.maketrans(DIGITS, LETTERS)) if letters else text


def _thinking(rng: random.Random, shares: ToyDocuments, numbers: list[int], operations: list[str]) -> tuple[str, int]:
    """Steps and the value they end in."""
    flawed = rng.random() < shares.flawed / max(1e-9, 1 - shares.answer_at_once)
    flaw = rng.choice(("skip", "wrong")) if flawed else ""
    at = rng.randrange(len(operations)) if flawed else -1
    script = rng.random()
    switch = len(operations)
    if script < shares.digits:
        letters = False
    elif script < shares.digits + shares.letters:
        letters = True
    else:
        letters, switch = rng.random() < 0.5, rng.randrange(1, max(2, len(operations)))
    steps, value = [], numbers[0]
    for index, (operation, number) in enumerate(zip(operations, numbers[1:], strict=True)):
        if index == switch:
            letters = not letters
        if index == at and flaw == "skip":
            continue
        result = _apply(value, operation, number)
        if index == at and flaw == "wrong":
            result = (result + rng.randrange(1, MODULUS)) % MODULUS
        steps.append(_in_script(f"{value}{operation}{number}={result}", letters))
        value = result
    return ",".join(steps), value


def _malform(rng: random.Random, thinking: str, answer: int) -> str:
    return rng.choice(
        (
            f"<think>{thinking}<answer>{answer}</answer>",
            f"{thinking}</think><answer>{answer}</answer>",
            f"<think>{thinking}</think>{answer}",
            f"<think>{thinking}</think><answer>{answer}",
            f"<think>{thinking}</think><answer>{answer}</answer><answer>{answer}</answer>",
            f"<think>{thinking}</think>",
        )
    )


def toy_documents(shares: ToyDocuments, count: int, seed: int) -> list[tuple[str, str]]:
    """(question, continuation) of `count` documents a base model reads; no held-out question is among them."""
    rng = random.Random(f"toy-documents-{seed}")
    documents = []
    for _ in range(count):
        question, numbers, operations = _draw(rng, shares.operations_min, shares.operations_max, held_out=False)
        if rng.random() < shares.answer_at_once:
            thinking, answer = "", rng.randrange(MODULUS)
            if rng.random() < shares.at_once_right:
                _, answer = _thinking(rng, ToyDocuments(flawed=0), numbers, operations)
        else:
            thinking, answer = _thinking(rng, shares, numbers, operations)
        if rng.random() < shares.malformed:
            text = _malform(rng, thinking, answer)
        else:
            text = f"<think>{thinking}</think><answer>{answer}</answer>"
        documents.append((question, text))
    return documents


def save_toy_tokenizer(folder: Path) -> Any:
    """Write the toy's tokenizer (one token per symbol or tag) into a model folder and return it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({symbol: number for number, symbol in enumerate(SYMBOLS)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<[a-z/]+>|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False)
    fast.save_pretrained(folder)
    return fast
