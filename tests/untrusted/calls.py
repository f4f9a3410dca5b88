"""How functions that read sampled text are called with any text, and what their values must be."""

import contextlib
import html
import io
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from stages.problems.episode import Episode, Group, Problem, Reward
from tests.untrusted.texts import framed

CHAIN = json.dumps({"source_dataset": "chain_sum"})


def of(name: str) -> Any:
    """The function or method that `module:qualified.name` names."""
    module, _, path = name.partition(":")
    found = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def problem(reference: str = "5", **fields: Any) -> Problem:
    return Problem("p", "What is 2 + 3?", reference, "s", **fields)


def episode(text: str, *, verdict: Any = None, **fields: Any) -> Episode:
    """An episode with that text, scored as `verdict` where one is given."""
    reward = None if verdict is None else Reward(1.0, {"accuracy": 1.0, "format": 1.0}, verdict)
    known = {
        "sample": 0,
        "prompt": "q",
        "prompt_ids": [1],
        "completion_ids": [2, 3],
        "logprobs": [-0.1, -0.2],
        "finish": "stop",
    }
    return Episode(problem=problem(), text=text, reward=reward, **(known | fields))


def group(*texts: str, verdict: Any = "right") -> Group:
    return Group(problem(), [episode(text, verdict=verdict, sample=number) for number, text in enumerate(texts)])


@dataclass(frozen=True)
class Reader:
    """How a function is called, and what must hold of its value."""

    call: Callable[[Any, str], Any]
    """Calls the function (given first) with the text in its place."""
    holds: Callable[[str, Any], bool]
    """Whether the value for a text is one that the function promises."""
    place: Callable[[str], str] = str
    """Puts a text where the function looks: in the thinking, in the answer, in a box."""
    cost: int = 1
    """What a call costs, in calls of a plain function: fewer and larger texts are drawn for a reader that writes files."""
    slow: float = 1.0
    """How much more time than others it takes for a large text; it is linear all the same."""
    unlike: tuple[str, ...] = ()
    """Patterns that it is not timed with."""


def plain(call: Callable[[Any, str], Any] = lambda f, text: f(text), **fields: Any) -> Reader:
    return Reader(call, **fields)


def is_text(_: str, value: Any) -> bool:
    return isinstance(value, str)


def is_text_or_none(_: str, value: Any) -> bool:
    return value is None or isinstance(value, str)


def is_part(text: str, value: Any) -> bool:
    return value is None or (isinstance(value, str) and value in text)


def is_bool(_: str, value: Any) -> bool:
    return isinstance(value, bool)


def is_share(_: str, value: Any) -> bool:
    return value is None or 0.0 <= value <= 1.0


def is_verdict(_: str, value: Any) -> bool:
    return value in ("right", "wrong", "none", "unjudged")


def are_verdicts(_: str, value: Any) -> bool:
    return len(value) > 0 and all(verdict in ("right", "wrong", "none") for verdict in value)


def is_seen(_: str, value: Any) -> bool:
    """Whether a terminal shows every character and acts on none."""
    return all(
        character.isprintable() or character in "\n\t\u3000\xa0" or character.isspace() for character in value
    ) and not any(character in "\x1b\x9b\r\x00\x85\u2028\u2029\u202e\u2066" for character in value)


def is_one_line(_: str, value: Any) -> bool:
    return value.isprintable() and "\n" not in value


def is_one_line_shown(text: str, value: Any) -> bool:
    return is_seen(text, value) and not any(character in "\n\t" for character in value)


def are_words(_: str, value: Any) -> bool:
    return all(isinstance(word, str) and word for word in value)


def are_finite(_: str, value: Any) -> bool:
    return all(math.isfinite(number) for number in value.values())


def thinking_of(text: str) -> str:
    return framed(text, "5")


def answer_of(text: str) -> str:
    return framed("so", text)


def program_in(text: str) -> str:
    return framed("code", f"```python\n{text}\n```")


def _asked(text: str, **fields: Any) -> list[Any]:
    from stages.rewards.answers.verifiers import Asked

    return [
        Asked(problem(**fields), text),
        Asked(problem(text or "x", **fields), "5"),
        Asked(problem(text or "x", **fields), text),
    ]


def _rewards(**fields: Any) -> Any:
    from stages.rewards.settings import Rewards

    return Rewards(**fields)


def _score(function: Any, text: str) -> list[Episode]:
    """Everything that rules tell of a text, by a verifier without processes."""
    found = []
    for place in ("tags", "boxed"):
        episodes = [episode(text), episode(text, finish="length")]
        rewards = _rewards(
            verifier="numeric", answer_in=place, language=1.0, overlong=1.0, overlong_buffer=1, repetition=1.0, random=0.5,
        )  # fmt: skip
        function(rewards, episodes, max_tokens=4, key="k")
        found += episodes
    return found


def _are_scored(_: str, value: list[Episode]) -> bool:
    return all(math.isfinite(e.scored.total) and e.scored.verdict in ("right", "wrong", "none") for e in value)


def _records(write: Any, text: str) -> bool:
    """Whether what is written can be read back and is equal."""
    from stages.rollout.records import read_groups

    groups = [group(text, text), Group(problem("7", metadata=CHAIN), [episode(text)])]
    groups[1] = Group(Problem("q", "q", "7", "s", CHAIN), groups[1].episodes)
    groups[1].episodes[0].problem = groups[1].problem
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "step-000001.parquet", groups)
        return bool(read_groups(Path(folder) / "step-000001.parquet") == groups)


def _choice(function: Any, text: str) -> dict[int, str]:
    from stages.curation.duplicates import Duplicates, Finder
    from stages.curation.settings import CurateConfig

    config = CurateConfig(kind="curate", sampler="base", problems={"source": "toy", "count": 2}, per_problem=2)
    with tempfile.TemporaryDirectory() as folder:
        found: dict[int, str] = function(group(text, text, framed("so", "5")), config, Finder(Duplicates(), Path(folder)))
    return found


def _near(near: Any, text: str) -> tuple[bool, bool]:
    from stages.curation.duplicates import Duplicates, Finder

    with tempfile.TemporaryDirectory() as folder:
        finder = Finder(Duplicates(among="dataset"), Path(folder))
        return near(finder, text), near(finder, text)


def _failure(function: Any, text: str) -> Any:
    from stages.curation.filters import Filters

    filters = Filters(min_length=1, max_length=10**7, longest_paragraph=100, code_blocks=False)
    both = _rewards(), _rewards(language_by="sentence", language_target="german")
    return [function(episode(text, verdict="right"), filters, rewards) for rewards in both]


def _reply(function: Any, text: str) -> list[Any]:
    """What an endpoint's reply says, with the text as content and as the whole reply; None where there is none."""
    from stages.curation.reply import NoReply

    bodies = [text, json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "model": text})]
    found = []
    for body in bodies:
        try:
            found.append(function(body))
        except NoReply as error:
            found.append(str(error))
    return found


def _messages(function: Any, text: str) -> bytes:
    """A chat as it is sent, with its key in the ledger."""
    from stages.curation.rewrite import Rewrite
    from stages.store.files import digest_json

    settings = Rewrite(endpoint={"url": "http://127.0.0.1:1/v1", "model": "m"})
    messages = function(settings, episode(text))
    return json.dumps(messages, ensure_ascii=False).encode() + digest_json(messages).encode()


def _review(function: Any, text: str) -> list[Any]:
    """The verdicts read back from a review file, filled in by nobody."""
    from stages.curation.review import read_verdicts, review_id

    found = []
    for form in ("csv", "jsonl"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "review" / f"review.{form}"
            names = {"id": review_id("p", 0, text), "problem_id": "p", "question": "q", "reference": "5", "answer": text}
            function(path, [names])
            found.append(read_verdicts(path) == {names["id"]: None})
    return found


def _gym(function: Any, text: str) -> list[str]:
    """As the worker sees it: what is raised is no verdict."""
    return [function(text, task) for task in ("countdown", "n_queens", "word_ladder")]


def _asserts(function: Any, text: str) -> int:
    from stages.rewards.code.asserts import UnreadableTests

    try:
        return len(function(text))
    except UnreadableTests:
        return 0


def _decoded(function: Any, text: str) -> Any:
    """A value from a program: whatever it is, the judge says whether the check holds."""
    from stages.rewards.code import verifier

    contents = [text, {"int": text}, {"bytes": text}, {text: text}, {"set": [text]}, {"dict": [[text, text]]}]
    return [verifier._holds(lambda values: values[0] == text, [content]) for content in contents] + [function(text)]


def _vote(function: Any, text: str) -> float:
    return float(function([text, "5", text, None], [False, True, False, False], lambda a, b: a.strip() == b.strip()))


def _found(function: Any, text: str) -> list[Any]:
    from stages.problems.ngrams import Questions

    questions = Questions(3)
    questions.add("a", text)
    questions.add("b", "What is 2 + 3, and why is it so?")
    return list(function(questions, [text, f"Well: {text}. And so?"]))


def _leaks(function: Any, text: str) -> int:
    cleaned = function([problem()], [("a", text), ("b", "What is it?")], 13)
    return len(cleaned.problems) + len(cleaned.leaks)


def _shown_on_page(function: Any, text: str) -> str:
    """As it stands on a run's page, in HTML."""
    import jinja2

    environment = jinja2.Environment(autoescape=True)
    return str(environment.from_string("{{ text }}").render(text=function(text, 2000)))


def _harmless_on_page(_: str, value: str) -> bool:
    value.encode()
    return not any(sign in value for sign in "<>\x00\u202e\x1b\x9b") and html.unescape(value).isascii() <= value.isascii()


def _row(text: str) -> dict[str, Any]:
    return {
        "file": "step-000001.parquet",
        "step": 1,
        "problem_id": text,
        "source": "s",
        "question": text,
        "reference": text,
        "sample": 0,
        "prompt": text,
        "text": text,
        "tokens": 2,
        "finish": "length",
        "reward": 1.0,
        "verdict": "right",
        "parts": {"accuracy": 1.0},
        "mean_logprob": -0.1,
    }


def _plain_rows(function: Any, text: str) -> str:
    return "\n".join(function([_row(text), _row("5")]))


def _bars_hold(text: str, value: str) -> bool:
    """Whether every line of the answer begins with the bar, so that none passes for one of ours."""
    lines = value.split("\n")
    return is_seen(text, value) and all(line.startswith(("problem ", "  | ", "  step 1, sample 0")) for line in lines)


def _panels(function: Any, text: str) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    function(console, [_row(text)])
    return console.file.getvalue()  # type: ignore[attr-defined]


def _document(function: Any, text: str) -> Any:
    """A command's JSON document, read again."""
    return json.loads(function(json.dumps({"text": text}, ensure_ascii=False)))["text"]


def _printed(function: Any, text: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        function(
            {"prompt": text, "answers": [{"sample": 0, "tokens": 1, "text": text, "finish": "stop", "mean_logprob": None}]},
            asked=True,
        )
    return out.getvalue()


def _mlflow_table(function: Any, text: str) -> bool:
    """Whether the table of answers comes back from the JSON that MLflow stores."""
    import pandas as pd

    from stages.rollout.records import write_groups
    from stages.store.folders import StageFolder

    with tempfile.TemporaryDirectory() as name:
        folder = StageFolder(Path(name))
        folder.rollouts.mkdir()
        write_groups(folder.rollouts / "step-000001.parquet", [group(text)])
        table = function(folder)
    stored = json.loads(pd.DataFrame(table).to_json(orient="split", index=False, date_format="iso"))
    return bool(dict(zip(stored["columns"], stored["data"][0], strict=True))["text"] == episode(text).text)


def _problem_numbers(function: Any, text: str) -> dict[str, float]:
    numbers: dict[str, float] = function(group(text, framed("so", "5"), text), _rewards(verifier="exact"))
    return numbers
