r"""The accuracy reward of code: does the program pass the tests (DeepSeek-R1, section 2.2: a compiler and test cases).

The program is the last ```python block of the final answer. The problem's reference answer is JSON, one of

- `{"stdin": [{"input": "1 2\n", "output": "3\n"}, ...]}`: a run for each pair; spaces at the ends of lines are not compared;
- `{"asserts": ["assert add(1, 2) == 3", ...]}`;
- `{"function": "add", "cases": [{"args": [1, 2], "returns": 3}, ...]}`: tuples count as lists, as JSON has none;
- `{"inputs": [...], "outputs": [...], "fn_name": "add"}`, as APPS, TACO and LiveCodeBench have it; without `fn_name`, texts.

All tests must pass, each within its time, all within the answer's (`answer time`). Expected results stay in this process: the
program sees its standard input, or which of its functions are called and with what, and can win only by giving the results.
`none` says that the sandbox failed or the tests cannot be read.
"""

import functools
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from stages.problems.episode import Verdict
from stages.rewards.code.asserts import Check, UnreadableTests, decode, read_asserts
from stages.rewards.code.sandbox import Sandbox, ready, run
from stages.rewards.code.supervisor import Ended, SandboxFailed, Stop, cause
from stages.runtime import heartbeat

if TYPE_CHECKING:
    from stages.rewards.answers.verifiers import Asked
    from stages.rewards.settings import Rewards

Reason = Literal["no code", "differs", "no result", "error", "signal", "unreadable tests", "sandbox"] | Stop
"""`differs`: another output or value; `no result`: ended before it gave one; `error`: an exception; `signal`: killed by one."""
LONGEST_RESULT = 1 << 18
"""Bytes of the values that a program may give back."""


@dataclass(frozen=True)
class Judgement:
    """What is said of one program."""

    verdict: Verdict
    reason: Reason | None = None
    """What stopped it, or why it is not right."""
    detail: str = ""
    """Which test, and the last line of the error; for people."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Pair(_Strict):
    input: str
    output: str


class _Stdin(_Strict):
    stdin: list[_Pair] = Field(min_length=1)


class _Asserts(_Strict):
    asserts: list[str] = Field(min_length=1)


class _Case(_Strict):
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    returns: Any


class _Function(_Strict):
    function: str
    cases: list[_Case] = Field(min_length=1)


class _Columns(_Strict):
    inputs: list[Any] = Field(min_length=1)
    outputs: list[Any]
    fn_name: str | None = None


_REFERENCE: TypeAdapter[_Stdin | _Asserts | _Function | _Columns] = TypeAdapter(_Stdin | _Asserts | _Function | _Columns)
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def judge(pairs: list[tuple[str, str]], settings: Sandbox) -> list[Verdict]:
    """A verdict per (reference, answer), in order. `UserError` when there is no sandbox here."""
    return [judgement.verdict for judgement in judgements(pairs, settings)]


def of_rewards(asked: Sequence["Asked"], rewards: "Rewards") -> list[Verdict]:
    """The judge of the verifier `code`; see stages/rewards/answers/verifiers.py."""
    return judge([(item.problem.answer, item.answer) for item in asked], rewards.sandbox)


def judgements(pairs: list[tuple[str, str]], settings: Sandbox) -> list[Judgement]:
    """What is said of each (reference, answer), in order. Equal pairs are judged once, `settings.width` at a time."""
    ready(settings)
    distinct = list(dict.fromkeys(pairs))
    with ThreadPoolExecutor(settings.width) as threads:
        found = dict(zip(distinct, threads.map(lambda pair: _judge(pair[0], pair[1], settings), distinct), strict=True))
    return [found[pair] for pair in pairs]


def program_of(answer: str) -> str | None:
    r"""The last closed ```python (or ```py) block of an answer, or None.

    >>> program_of("Sum them:\n```python\nprint(1 + 2)\n```\nDone.")
    'print(1 + 2)\n'
    """
    found, block = None, None
    for line in answer.splitlines(keepends=True):
        mark = line.strip()
        if block is None and mark.lower() in {"```python", "```py", "```python3"}:
            block = ""
        elif block is not None and mark == "```":
            found, block = block, None
        elif block is not None:
            block += line
    return found


def _judge(reference: str, answer: str, settings: Sandbox) -> Judgement:
    heartbeat.progress()
    program = program_of(answer)
    if program is None:
        return Judgement("wrong", "no code")
    try:
        tests = _read(reference)
        if isinstance(tests, list):
            return _judge_outputs(program, tests, settings)
        return _judge_values(program, tests.checks, settings)
    except UnreadableTests as error:
        return Judgement("none", "unreadable tests", str(error))
    except SandboxFailed as error:
        return Judgement("none", "sandbox", str(error))


@dataclass(frozen=True)
class _Checks:
    checks: tuple[Check, ...]


@functools.lru_cache(maxsize=256)
def _read(reference: str) -> list[tuple[str, str]] | _Checks:
    """Pairs of standard input and output, or checks of values."""
    try:
        tests = _REFERENCE.validate_json(reference)
    except ValidationError as error:
        raise UnreadableTests("not tests: " + error.errors()[0]["msg"]) from error
    match tests:
        case _Stdin(stdin=pairs):
            return [(pair.input, pair.output) for pair in pairs]
        case _Asserts(asserts=texts):
            return _Checks(tuple(check for text in texts for check in read_asserts(text)))
        case _Function(function=name, cases=cases):
            return _Checks(tuple(_case(name, case.args, case.kwargs, case.returns) for case in cases))
        case _Columns(inputs=inputs, outputs=outputs, fn_name=name):
            if len(inputs) != len(outputs):
                raise UnreadableTests(f"{len(inputs)} inputs and {len(outputs)} outputs")
            if name is None:
                return [(_text(a), _text(b)) for a, b in zip(inputs, outputs, strict=True)]
            return _Checks(tuple(_case(name, list(a), {}, b) for a, b in zip(inputs, outputs, strict=True)))


def _text(value: Any) -> str:
    """A text, or lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value) + "\n"
    if not isinstance(value, str):
        raise UnreadableTests(f"not a text: {value!r:.80}")
    return value


def _case(name: str, args: list[Any], kwargs: dict[str, Any], returns: Any) -> Check:
    """A call by arguments, of a function or of a method of `Solution`."""
    if not _NAME.fullmatch(name):
        raise UnreadableTests(f"not the name of a function: {name!r:.80}")
    shown = ", ".join([*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())])
    function = f"({name} if {name.partition('.')[0]!r} in globals() else Solution().{name})"
    expression = f"{function}(*{args!r}, **{kwargs!r})"
    return Check(f"{name}({shown})"[:200], (expression,), lambda values: bool(_listed(values[0]) == _listed(returns)))


def _listed(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_listed(item) for item in value]
    return {key: _listed(item) for key, item in value.items()} if isinstance(value, dict) else value


def _judge_outputs(program: str, pairs: list[tuple[str, str]], settings: Sandbox) -> Judgement:
    left = settings.whole_s
    for number, (given, expected) in enumerate(pairs, 1):
        if left <= 0:
            return Judgement("wrong", "answer time", f"test {number}: not begun")
        ended = run(program, settings=settings, stdin=given.encode(), left_s=left)
        left -= ended.seconds
        if (bad := _ended_badly(ended)) is not None:
            return Judgement("wrong", bad, _detail(f"test {number}", ended))
        if _lines(ended.stdout.decode(errors="replace")) != _lines(expected):
            return Judgement("wrong", "differs", f"test {number}")
    return Judgement("right")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _judge_values(program: str, checks: tuple[Check, ...], settings: Sandbox) -> Judgement:
    asked = [expression for check in checks for expression in check.asked]
    ended = run(program, settings=settings, asked=asked)
    if (bad := _ended_badly(ended)) is not None:
        return Judgement("wrong", bad, _detail("", ended))
    if len(ended.stdout) > LONGEST_RESULT:
        return Judgement("wrong", "output", "values too long")
    try:
        answers = json.loads(ended.stdout)
        answers = [(str(kind), content) for kind, content in answers]
    except (ValueError, TypeError, RecursionError):
        return Judgement("wrong", "no result", _detail("", ended))
    if len(answers) != len(asked):
        return Judgement("wrong", "no result", f"{len(answers)} values of {len(asked)}")
    left = iter(answers)
    for check in checks:
        given = [next(left) for _ in check.asked]
        if errors := [content for kind, content in given if kind != "value"]:
            # Never `str()` of what is no text: the program may have written a list nested too deeply for it.
            raised = errors[0] if isinstance(errors[0], str) else ""
            return Judgement("wrong", cause(raised) or "error", f"{check.text}: {raised}")
        if not _holds(check.holds, [content for _, content in given]):
            return Judgement("wrong", "differs", check.text)
    return Judgement("right")


def _holds(holds: Callable[[list[Any]], bool], contents: list[Any]) -> bool:
    """Whether it holds. The values are the program's choice: whatever error they lead to is its own."""
    try:
        return holds([decode(content) for content in contents])
    except Exception:  # noqa: BLE001
        return False


def _ended_badly(ended: Ended) -> Reason | None:
    if ended.stop is not None:
        return ended.stop
    if ended.code == 0:
        return None
    return "signal" if ended.code > 128 else "error"


def _detail(test: str, ended: Ended) -> str:
    last = (ended.stderr.strip().splitlines() or [f"status {ended.code}"])[-1]
    return ": ".join(part for part in (test, last[-300:]) if part)
