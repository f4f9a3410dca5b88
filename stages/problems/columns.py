"""Columns of a row -> a problem: which columns, how the reference answer is cut out of one, and ready maps by name."""

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from stages.contract.config import ADDED, EXECUTION, Config
from stages.problems.episode import ProblemVerifier
from stages.problems.pass_rate import PassRate
from stages.problems.rows import Row

FORMATS: dict[str, dict[str, Any]] = {
    # openai/gsm8k, and grade_school_math/data of openai/grade-school-math
    "gsm8k": {"question": "question", "answer": "answer", "answer_after": "####"},
    # hendrycks/competition_math and what was made of it (MATH-500)
    "math": {"question": "problem", "answer": "solution", "extract": "boxed"},
    # HuggingFaceH4/aime_2024, AI-MO/aimo-validation-aime: answers of three digits, 025
    "aime": {"question": "problem", "answer": "answer", "extract": "number"},
    # AI-MO/aimo-validation-amc: answers are floats
    "amc": {"question": "problem", "answer": "answer", "extract": "number"},
    # the single operations as a file of `input` and `target`: answers are floats
    "mawps": {"question": "input", "answer": "target", "extract": "number"},
    # ChilleD/SVAMP, and SVAMP.json of arkilpatel/SVAMP: the story and what it asks stand apart
    "svamp": {"question": ("Body", "Question"), "answer": "Answer", "extract": "number"},
}
"""Name of a dataset -> its columns, and how its answer is cut out."""


class Chosen(Config):
    """Which problems of a source are taken."""

    offset: int = Field(default=0, ge=0)
    """Problems to leave out at the start (after shuffling)."""
    longest_question: int | None = Field(default=None, ge=1)
    """Characters of the longest question taken: short ones tend to be easy, and their prompts cost less. All by default."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many problems; all by default."""
    shuffle_seed: int | None = Field(default=None, ge=0)
    """Shuffles the problems before `offset` and `limit`; by default they keep the file's order."""
    pass_rate: Annotated[PassRate | None, ADDED] = None
    """Keeps, before shuffling, the problems whose measured pass rate lies between two bounds."""
    verifier: Annotated[ProblemVerifier | None, ADDED] = None
    """What judges the answers to these problems, by a name of `rewards.verifier`; `unjudged`: nothing does (a general prompt,
    rewarded by preference, format and the like; it needs no reference answer). Null: the stage's `rewards.verifier`."""

    @model_validator(mode="after")
    def _a_rate_is_of_judged_answers(self) -> Self:
        if self.verifier == "unjudged" and self.pass_rate is not None:
            raise ValueError("unjudged problems have no pass rate: take out `pass_rate`, or name a verifier that judges them")
        return self


class Columns(Chosen):
    """Which columns of a row make a problem, and which problems are taken."""

    format: Annotated[Literal["gsm8k", "math", "aime", "amc", "mawps", "svamp"] | None, EXECUTION] = None
    """A ready map: the values of the other fields for a well-known dataset, each of which can still be set."""
    question: str | tuple[str, ...] = "question"
    """Column with the question; of several the texts are joined with a space."""
    answer: str = "answer"
    """Column with the reference answer; where the problems are unjudged it may be missing or empty."""
    id: Annotated[str | None, ADDED] = None
    """Column with a name of the problem; by default its line in the file."""
    answer_after: str | None = Field(default=None, min_length=1)
    """The reference answer is what follows the last occurrence of this text in the answer column; GSM8K: `####`."""
    answer_pattern: Annotated[str | None, ADDED] = Field(default=None, min_length=1)
    r"""The reference answer is the last match of this regular expression in the answer column, of its first group if it has
    one: `The answer is (\S+)`."""
    extract: Annotated[Literal["boxed", "number"] | None, ADDED] = None
    r"""`boxed`: the reference answer is what the last `\boxed{}` of the answer column holds; `number`: it is the column's
    number, written as an integer where it is one (27.0 -> 27)."""

    @model_validator(mode="before")
    @classmethod
    def _ready_map(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(name := given.get("format"), str):
            return {**FORMATS.get(name, {}), **given}
        return given

    @field_validator("answer_pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from error
        return pattern

    @model_validator(mode="after")
    def _one_way_to_the_answer(self) -> Self:
        ways = [name for name in ("answer_after", "answer_pattern", "extract") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(f'`{way}`' for way in ways)} are both set: only one can cut out the answer")
        if not self.question:
            raise ValueError("`question` names no column")
        return self

    @property
    def questions(self) -> tuple[str, ...]:
        """Columns whose texts make the question."""
        return (self.question,) if isinstance(self.question, str) else self.question

    @property
    def needs_no_answer(self) -> bool:
        """Whether a row may lack the reference answer."""
        return self.verifier == "unjudged"


def read_columns(row: Row, columns: Columns) -> tuple[str, str, str, str]:
    """Name within the source, question, answer, and the fault that makes them unusable (empty when there is none).

    An unjudged problem without a usable answer has the answer "".
    """
    if row.fault:
        return "", "", "", row.fault
    texts, answer = [], ""
    for column in columns.questions:
        text, fault = _text(row, column)
        if fault:
            return "", "", "", fault
        texts.append(text)
    given, no_answer = _text(row, columns.answer)
    if no_answer and not columns.needs_no_answer:
        return "", "", "", no_answer
    name, fault = _text(row, columns.id) if columns.id else (str(row.number), "")
    if fault:
        return "", "", "", fault
    if not no_answer:
        answer, no_answer = _reference(given, row.values[columns.answer], columns)
    return name, " ".join(texts), answer, "" if columns.needs_no_answer else no_answer


def _text(row: Row, column: str) -> tuple[str, str]:
    value = row.values.get(column)
    if column not in row.values:
        return "", f"no column `{column}`"
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        return "", f"column `{column}` is neither text nor number"
    if isinstance(value, float) and not math.isfinite(value):
        return "", f"column `{column}` is no finite number"
    text = "" if value is None else str(value).strip()
    if not text:
        return "", f"column `{column}` is empty"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "", f"column `{column}` has half a character in it"
    return text, ""


def _reference(text: str, value: Any, columns: Columns) -> tuple[str, str]:
    """The reference answer in the answer column's text, and the fault when there is none."""
    column = columns.answer
    if columns.answer_after is not None:
        _, found, after = text.rpartition(columns.answer_after)
        if not found:
            return "", f"no `{columns.answer_after}` in column `{column}`"
        answer = _without_grouping(after.replace("$", "")).strip()
        return answer, "" if answer else f"nothing after `{columns.answer_after}` in column `{column}`"
    if columns.answer_pattern is not None:
        matches = list(re.finditer(columns.answer_pattern, text))
        answer = ((matches[-1][1] if matches[-1].re.groups else matches[-1][0]) or "").strip() if matches else ""
        return answer, "" if answer else f"no match of `answer_pattern` in column `{column}`"
    if columns.extract == "boxed":
        answer = last_boxed(text)
        return answer, "" if answer else rf"nothing in a \boxed of column `{column}`"
    if columns.extract == "number":
        answer = _number(value)
        return answer, "" if answer else f"no number in column `{column}`"
    return text, ""


def _without_grouping(text: str) -> str:
    """`$1,200` is how data sets write 1200; a comma that does not part thousands is kept."""
    return re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)


def last_boxed(text: str) -> str:
    r"""What the last `\boxed{…}` (or `\fbox{…}`, or `\boxed 5`) holds; empty when there is none or it is never closed.

    >>> last_boxed(r"so \boxed{1} or rather \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    starts = list(re.finditer(r"\\f?box(?:ed)?(?![A-Za-z])\s*", text))
    if not starts:
        return ""
    rest = text[starts[-1].end() :]
    if not rest.startswith("{"):
        bare = re.match(r"[^\s$.,]+", rest)
        return bare[0] if bare else ""
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # an escaped brace closes nothing
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return rest[1 : brace.start()].strip()
    return ""


def _number(value: Any) -> str:
    if isinstance(value, str):
        text = _without_grouping(value.strip().replace("$", ""))
        if re.fullmatch(r"[-+]?\d+", text):
            return str(int(text)) if len(text) < 1000 else text
        if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?", text):
            return ""
        value = float(text)
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        return str(int(value)) if value.is_integer() else repr(value)
    return str(value)
