"""The documents that supervised training reads: their texts, their problems, and which of them are held out.

Documents about one problem are held out together: those with the same `problem_id`, and those with the same prompt, whichever
dataset they are in. No torch here.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.contract.errors import UserError
from stages.problems.rows import read_rows
from stages.rollout.token_text import TokenText
from stages.runtime import heartbeat
from stages.supervised.settings import Validation

AT_ONCE = 1000
"""Documents tokenized in one call."""


@dataclass(frozen=True)
class Document:
    """A prompt that is read and a completion that is learned."""

    prompt: str
    completion: str
    problem: str = ""
    """Id of the problem it is about; empty where none is known."""
    dataset: int = 0
    """Number of the dataset it is from."""


def load_documents(path: Path, dataset: int = 0) -> list[Document]:
    """The documents of a stage's dataset, in order.

    Raises UserError when a row has no text: a dataset is a stage's output, in which nothing is left out.
    """
    mend = "compute the stage that made it again (--fresh)"
    documents = []
    for row in read_rows(path):
        prompt, completion, problem = (row.values.get(name) for name in ("prompt", "completion", "problem_id"))
        if not isinstance(prompt, str) or not isinstance(completion, str):
            what = f"row {row.number} has no text in `prompt` and `completion`"
            raise UserError(what, where=str(path), mend=mend)
        documents.append(Document(prompt, completion, "" if problem is None else str(problem), dataset))
    if not documents:
        raise UserError("the dataset has no rows", where=str(path), mend="loosen the filters of the stage that made it")
    return documents


def tokenize(
    documents: Sequence[Document], tokenizer: Any, ends: Iterable[int] = ()
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Token ids of each prompt and completion, the latter with its end token. Four bytes a token: datasets are large.

    The two are tokenized apart, as in sampling, where the prompt is tokenized before an answer exists. `ends`: ids of the
    declared end tokens, of which the tokenizer's own is one.
    Raises UserError when the tokenizer has no end token, or makes nothing of a prompt.
    """
    text = TokenText(tokenizer, ends)
    encoded: list[tuple[Sequence[int], Sequence[int]]] = []
    for start in range(0, len(documents), AT_ONCE):
        heartbeat.progress()
        some = documents[start : start + AT_ONCE]
        prompts = text.prompts([d.prompt for d in some])
        completions = text.completions([d.completion for d in some])
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), start=start + 1):
            if not prompt:
                raise UserError(f"document {number} has a prompt without tokens", where="data", mend="give it a prompt")
            encoded.append((array("i", prompt), array("i", completion)))
    return encoded


def hold_out(documents: Sequence[Document], validation: Validation, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the documents that are trained on, and of those that are held out.

    Which problems are held out depends on the seed and their prompts, not on the order of the documents.
    Raises UserError when no document is left to train on.
    """
    wanted = validation.wanted(len(documents))
    of_problem: dict[str, list[int]] = {}
    for number, problem in enumerate(_problems(documents)) if wanted else ():
        of_problem.setdefault(problem, []).append(number)
    held: list[int] = []
    for problem in sorted(of_problem, key=lambda text: hashlib.sha256(f"held-out-{seed}-{text}".encode()).digest()):
        if len(held) >= wanted:
            break
        held += of_problem[problem]
    if len(held) == len(documents):
        what = f"all {len(documents)} documents are held out, of {len(of_problem)} problems"
        raise UserError(what, where="validation", mend="hold out fewer, or give more data")
    kept_back = set(held)
    return [number for number in range(len(documents)) if number not in kept_back], sorted(held)


def _problems(documents: Sequence[Document]) -> list[str]:
    """For each document a name of its problem: the first in the alphabet of all prompts that are linked to it."""
    above: dict[str, str] = {}

    def top(name: str) -> str:
        while (parent := above.setdefault(name, name)) != name:
            above[name] = name = above[parent]
        return name

    for document in documents:
        prompt, problem = top(f"prompt {document.prompt}"), f"id {document.problem}" if document.problem else ""
        if problem:
            above[prompt] = top(problem)
    tops = [top(f"prompt {document.prompt}") for document in documents]
    names: dict[str, str] = {}
    for name, document in zip(tops, documents, strict=True):
        names[name] = min(names.get(name, document.prompt), document.prompt)
    return [names[name] for name in tops]
