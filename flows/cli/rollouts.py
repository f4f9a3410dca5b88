"""`r1 rollouts RUN STAGE`: read what a model wrote, after a stage or while it runs.

A model's words are data: nothing in them reaches the terminal but characters that are seen.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from flows.cli.run import Answer, runs_of
from flows.output import one_line, printable
from flows.runs.answers import Row, Wanted, answer_files, first_rows, number_of, read_rows
from flows.runs.lookup import folder_of, record_of
from flows.runs.record import RunRecord
from stages.contract.errors import ExitStatus, UserError

if TYPE_CHECKING:
    from rich.console import Console

POLL_SECONDS = 1.0
MOST_LINES = 4000
"""Of an answer in a panel."""
_COLOURS = {"right": "green", "wrong": "red", "none": "yellow"}


def rollouts(options: argparse.Namespace) -> Answer:
    """`r1 rollouts`."""
    record = record_of(runs_of(options), options.run, options.stage)
    wanted = Wanted(options.step, options.last, options.verdict, options.problem)
    told: list[str] = []

    def damaged(error: UserError) -> None:
        told.append(str(error))
        print(f"r1: {error}", file=sys.stderr)

    if options.follow:
        if options.json or options.sort:
            what = "--follow prints answers as they come"
            raise UserError(what, where="command line", mend="leave out --json and --sort")
        _show_live(_follow(record, options.stage, wanted, damaged))
        return ExitStatus.MISTAKE if told else ExitStatus.DONE, None
    folder = folder_of(record, options.stage)
    if not answer_files(folder.rollouts):
        raise UserError(f"stage `{options.stage}` has recorded no answers", where=record.name, mend=_others(record))
    rows, more = first_rows(read_rows(wanted.files(folder.rollouts), wanted, damaged), options.sort, options.limit)
    if not options.json:
        _show(rows)
        if more:
            print(f"the first {len(rows)}; there are more: --limit 0 shows all", file=sys.stderr)
        elif not rows and not told:
            print("no recorded answer is like that", file=sys.stderr)
    facts = {"run": record.name, "stage": options.stage, "folder": str(folder.path)}
    return ExitStatus.MISTAKE if told else ExitStatus.DONE, {**facts, "rows": rows, "more": more, "damaged": told}


def _others(record: RunRecord) -> str:
    have = [n for n, facts in record.stages.items() if facts["folder"] and answer_files(record.place(n).rollouts)]
    return f"stages that have: {', '.join(have)}" if have else "no stage of this run has"


def _follow(record: RunRecord, stage: str, wanted: Wanted, damaged: Any) -> Iterator[Row]:
    """The answers of the newest file, then those of each new one, until the stage or its run has ended."""
    seen: set[str] | None = None
    while True:
        # Looked at before the files: what was recorded until then is among them.
        over = record.status() != "running" or (record.stages[stage]["folder"] and record.place(stage).manifest.exists())
        if record.stages[stage]["folder"]:
            files = sorted(answer_files(record.place(stage).rollouts), key=number_of)
            seen = {path.name for path in files[:-1]} if seen is None else seen
            fresh = [path for path in files if path.name not in seen]
            seen |= {path.name for path in fresh}
            yield from read_rows([path for path in fresh if wanted.step in (None, number_of(path))], wanted, damaged)
        if over:
            return
        time.sleep(POLL_SECONDS)
        record = RunRecord.open(record.folder)


def _show(rows: list[Row]) -> None:
    """In a pager on a terminal, as plain lines elsewhere."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        for line in _lines(rows):
            print(line)
    elif rows:
        os.environ.setdefault("LESS", "-R")  # else less shows colours as their codes
        with console.pager(styles=True):
            _panels(console, rows)


def _show_live(rows: Iterator[Row]) -> None:
    from rich.console import Console

    console = Console()
    try:
        if console.is_terminal:
            _panels(console, rows)
        else:
            for line in _lines(rows):
                print(line, flush=True)
    except KeyboardInterrupt:
        print("stopped following", file=sys.stderr)


def _lines(rows: Iterable[Row]) -> Iterator[str]:
    """Plain text. Every line of an answer begins with a bar, so that none can pass for one of ours."""
    asked = None
    for row in rows:
        if asked != (asked := (row["file"], row["problem_id"])):
            yield f"problem {_question(row)}"
        yield f"  {' · '.join(_facts(row))}"
        yield from (f"  | {line}" for line in printable(row["text"]).split("\n"))


def _panels(console: "Console", rows: Iterable[Row]) -> None:
    """Panels. Text, never markup: brackets in an answer mean nothing."""
    from rich.panel import Panel
    from rich.text import Text

    asked = None
    for row in rows:
        if asked != (asked := (row["file"], row["problem_id"])):
            console.print(Text(f"problem {_question(row)}", style="bold"))
        colour = _COLOURS.get(row["verdict"], "none")
        body, facts = Text(_shortened(printable(row["text"]))), _facts(row)
        above, below = Text(" · ".join(facts[:-1])), Text(facts[-1])
        panel = Panel(body, title=above, title_align="left", subtitle=below, subtitle_align="right", border_style=colour)
        console.print(panel, highlight=False)


def _shortened(text: str) -> str:
    """The text, without the middle where it has more lines than anyone reads: a panel takes a quarter of a millisecond each."""
    lines = text.split("\n")
    if len(lines) <= MOST_LINES:
        return text
    half = MOST_LINES // 2
    left_out = f"… {len(lines) - 2 * half:,} lines left out; `--json` has them …"
    return "\n".join([*lines[:half], left_out, *lines[-half:]])


def _question(row: Row) -> str:
    question = f"{one_line(row['problem_id'], 60)}: {one_line(row['question'])}"
    return f"{question} (reference: {one_line(row['reference'], 80)})" if row["reference"] else question


def _facts(row: Row) -> list[str]:
    """What is said of an answer; the last of it is its length and likelihood."""
    facts = [f"{row['file'].partition('-')[0]} {row['step']}, sample {row['sample']}"]
    if row["verdict"] is not None:
        parts = ", ".join(f"{one_line(name, 40)} {value:.3g}" for name, value in row["parts"].items())
        facts += [row["verdict"], f"reward {row['reward']:.3g}" + (f" ({parts})" if parts else "")]
    cut = ", cut" if row["finish"] == "length" else ""
    likely = "" if row["mean_logprob"] is None else f", mean log-prob {row['mean_logprob']:.3f}"
    return [*facts, f"{row['tokens']} tokens{cut}{likely}"]
