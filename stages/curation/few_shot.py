"""Worked examples from a file: few-shot prompting with long thoughts, the paper's other source of cold-start data (v1, 2.3.1).

The examples lead a model to the form; they are no part of the dataset's prompts, so that what is trained on the answers gives
them without examples.
"""

from pathlib import Path

from pydantic import Field

from stages.contract.config import Config, ExternalPath
from stages.contract.errors import UserError
from stages.problems.rows import read_rows
from stages.problems.templates import Example

COLUMNS = ("question", "thinking", "answer")


class FewShot(Config):
    """A file of worked examples."""

    path: ExternalPath
    """The file (.jsonl, .json, .csv, .parquet) with columns `question`, `thinking` and `answer`, without tags."""
    count: int | None = Field(default=None, ge=1)
    """How many of them, from its start; all by default."""


def load_examples(settings: FewShot) -> tuple[Example, ...]:
    """The worked examples.

    Raises UserError when a row is none, or when there are fewer than asked for: every one of them matters.
    """
    examples: list[Example] = []
    for row in read_rows(Path(settings.path)):
        if settings.count is not None and len(examples) == settings.count:
            break
        texts = {name: row.values.get(name) for name in COLUMNS}
        lacking = [name for name, text in texts.items() if not isinstance(text, str) or not text.strip()]
        if row.fault or lacking:
            what = row.fault or f"no text in column `{lacking[0]}`"
            mend = f"give every row the columns {', '.join(COLUMNS)}"
            raise UserError(what, where=f"{settings.path}: line {row.number}", mend=mend)
        examples.append(Example.model_validate(texts))
    if len(examples) < (settings.count or 1):
        mend = "add some, or ask for fewer (`few_shot.count`)"
        raise UserError(f"the file has {len(examples)} worked examples", where=settings.path, mend=mend)
    return tuple(examples)
