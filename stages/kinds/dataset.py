"""A dataset of the user's in place of a stage's: prompts and completions, questions and completions, or conversations.

The output is what `curate` writes and `sft` reads: parquet with prompt, completion, problem id and source. Rows that cannot be
used are named by file and line, counted and left out, as are, where the recipe decontaminates, those whose prompt an evaluation
asks; what is learned is not searched. The paper's own 800k documents are not published; this is where others
come in.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from stages.contract.config import ADDED, ExternalPath, ModelRef
from stages.contract.errors import UserError
from stages.evals.contamination import decontaminated
from stages.problems.decontamination import Cleaned, Decontaminated
from stages.problems.episode import Problem
from stages.problems.rows import Row, columns_hint, read_rows
from stages.problems.templates import Template
from stages.store.files import whole_folder, write_json
from stages.store.stage import Result, StageContext, StageKind
from stages.supervised.conversations import Chat, Refused, read_messages, read_tools

SHOWN = 5
"""Refused rows that are named one by one; the rest are counted."""
THINKING_LEFT_OUT = "conversations without the thinking of their earlier turns, which the chat template leaves out"
_MARK = re.compile(r"<\|\w+\|>|\[/?INST\]")
"""What chat templates put around what is said: a short question ends there, as at the end of a line."""


class DatasetConfig(Decontaminated):
    """Where the documents come from. A row with `messages` is a conversation, any other has a prompt and a completion."""

    kind: Literal["dataset"]
    """This kind."""
    path: ExternalPath
    """A .parquet or .jsonl file (or .json, .csv)."""
    prompt: str = "prompt"
    """Column with the text that is read, exactly as the model is to see it."""
    question: str | None = None
    """Column with questions, from which `template` makes the prompts; null: `prompt` has them ready."""
    template: Template = Template()
    """How a question becomes a prompt. Not looked at without `question`."""
    completion: str = "completion"
    """Column with the text that is learned; the tokenizer's end token is put behind it."""
    messages: str = "messages"
    """Column with conversations: lists of {role, content}. What the assistant says last is learned, all before it is read.
    Further fields (`reasoning_content`, `tool_calls`) go where the chat template puts them; a row is left out, by the field's
    name, where it has no place for one."""
    tools: Annotated[str, ADDED] = "tools"
    """Column with the definitions of the tools that a conversation may call, a list or JSON; it may be missing."""
    tokenizer: ModelRef | None = None
    """The stage whose model's chat template makes texts of conversations; needed for these alone."""
    problem: str = "problem_id"
    """Column that names the problem a row is about: rows of one problem are held out together. It may be missing."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many rows, from the file's start; all by default. What an evaluation asks is left out of these."""


def run(context: StageContext[DatasetConfig]) -> Result:
    """Read the rows and write the dataset.

    Raises UserError when no row can be used, or when evaluations ask every one.
    """
    config = context.config
    path, place = Path(config.path), context.inputs.get("tokenizer")
    refused: Counter[str] = Counter()
    columns: set[str] = set()
    documents: list[dict[str, Any]] = []
    asked: list[str] = []
    chat, partly = Chat(place), Counter[str]()
    for row in read_rows(path):
        if config.limit is not None and len(documents) == config.limit:
            break
        columns |= row.values.keys()
        try:
            document, question = _document(row, config, chat, partly)
            documents.append(document | {"source": path.stem, "row": row.number})
            asked.append(question)
        except Refused as reason:
            if refused.total() < SHOWN:
                print(f"warning: {path}: line {row.number}: {reason}; the row is left out", file=sys.stderr)
            refused[str(reason)] += 1
    counts = ", ".join(f"{number} × {reason}" for reason, number in refused.items())
    if not documents:
        mend = columns_hint(wanted_columns(config), columns)
        raise UserError(f"no document is left of it ({counts or 'no rows'})", where=str(path), mend=mend)
    if refused.total() > SHOWN:
        rows = refused.total() + len(documents)
        print(f"warning: {path}: {refused.total()} of {rows} rows are left out", file=sys.stderr)
    documents, cleaned = _unasked(config, documents, asked)
    metrics = {"documents": float(len(documents)), "left_out": float(refused.total())}
    if config.decontaminate is not None:
        metrics["decontaminated"] = float(len(cleaned.leaks))
    with whole_folder(context.folder.output("dataset")) as folder:
        _write(folder / "train.parquet", documents)
        write_json(folder / "report.json", {**metrics, "refused": dict(refused)})
    remarks = [f"path: {refused.total()} rows left out ({counts})"] if counts else []
    remarks += [f"path: {number} {what}" for what, number in partly.items()]
    notes = {"refused": dict(refused), "decontaminated": cleaned.report()}
    return Result(metrics=metrics, notes=notes, remarks=[*remarks, *cleaned.remarks("path")])


def wanted_columns(config: DatasetConfig) -> tuple[str, str]:
    """Columns of a row that is no conversation."""
    return config.question or config.prompt, config.completion


def first_document(config: DatasetConfig, rows: Iterable[Row]) -> Row:
    """The first of some rows that gives a document, or that is a conversation, which the chat template has yet to render.

    Raises UserError, as `run` does, when none does.
    """
    reasons: Counter[str] = Counter()
    columns: set[str] = set()
    for row in rows:
        columns |= row.values.keys()
        if not row.fault and row.values.get(config.messages) is not None:
            return row
        try:
            _document(row, config, Chat(None), Counter())
        except Refused as reason:
            reasons[str(reason)] += 1
        else:
            return row
    counts = ", ".join(f"{number} × {reason}" for reason, number in reasons.items())
    mend = columns_hint(wanted_columns(config), columns)
    raise UserError(f"no document is left of it ({counts or 'no rows'})", where=config.path, mend=mend)


def _unasked(config: DatasetConfig, documents: list[dict[str, Any]], asked: list[str]) -> tuple[list[dict[str, Any]], Cleaned]:
    """The documents whose question, in `asked`, no evaluation asks; all where the recipe does not decontaminate."""
    problems = [
        Problem(f"{document['source']}:{document['row']}", question, "", document["source"])
        for document, question in zip(documents, asked, strict=True)
    ]
    examples = config.template.examples if config.question is not None else ()
    cleaned = decontaminated(config, problems, examples=examples, where="path")
    left_out = {leak.problem for leak in cleaned.leaks}
    pairs = zip(documents, problems, strict=True)
    return [document for document, problem in pairs if problem.id not in left_out], cleaned


def _document(row: Row, config: DatasetConfig, chat: Chat, counts: Counter[str]) -> tuple[dict[str, Any], str]:
    """The document, and what of it an evaluation may ask: without what the template puts around it.

    `counts` counts what is to be said of documents that are taken.
    """
    if row.fault:
        raise Refused(row.fault)
    problem = row.values.get(config.problem)
    if isinstance(problem, str) and not _is_text(problem):
        raise Refused(f"column `{config.problem}` has half a character in it")
    if (messages := row.values.get(config.messages)) is not None:
        talk = read_messages(messages)
        rendered = chat.render(talk, read_tools(row.values.get(config.tools)))
        if rendered.thinking_left_out:
            counts[THINKING_LEFT_OUT] += 1
        prompt, completion = rendered.prompt, rendered.completion
        question = "\n".join(message["content"] for message in talk[:-1])
    elif config.question is not None:
        question = _text(row, config.question)
        prompt = config.template.render(question)
        completion = _text(row, config.completion).removeprefix(config.template.opened)
    else:
        prompt, completion = _text(row, config.prompt), _text(row, config.completion)
        question = _MARK.sub("\n", prompt)
    return {"prompt": prompt, "completion": completion, "problem_id": None if problem is None else str(problem)}, question


def _text(row: Row, column: str) -> str:
    """The text of a column, as it is: spaces at its ends belong to it."""
    if column not in row.values:
        raise Refused(f"no column `{column}`")
    text = row.values[column]
    if not isinstance(text, str):
        raise Refused(f"column `{column}` is no text")
    if not text.strip():
        raise Refused(f"column `{column}` is empty")
    if not _is_text(text):
        raise Refused(f"column `{column}` has half a character in it")
    return text


def _is_text(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _write(path: Path, documents: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    schema = pa.schema([("prompt", text), ("completion", text), ("problem_id", text), ("source", text), ("row", pa.int64())])
    pq.write_table(pa.Table.from_pylist(documents, schema), path)


KIND = StageKind(name="dataset", version=2, config=DatasetConfig, output="dataset", run=run)
"""The user's own documents for supervised training."""
