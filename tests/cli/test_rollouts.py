"""`r1 rollouts`: what was sampled is read, also live, also when files are damaged, and nothing in it controls the terminal."""

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.cli import rollouts
from flows.output import printable, printable_json
from flows.runs.answers import rows_of
from stages.contract.errors import ExitStatus, UserError
from stages.store.folders import StageFolder
from tests.runs.built_runs import build_run, build_stage, call, folder_name, write_answers

RL = folder_name("rl", 1)
HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202egnp\u2066 \x9b31m [bold]loud[/bold] \r| sample"


@pytest.fixture
def sampled(tmp_path: Path) -> StageFolder:
    """A stage with three steps of answers."""
    folder = build_stage(tmp_path, RL)
    build_run(tmp_path, "a-1", {"zero": RL, "later": None})
    for step in (1, 2, 10):
        write_answers(folder, step, [(f"s{step}", "right", 1.0), ("longer", "wrong", 0.1 * step), ("x", "none", 0.0)])
    return folder


def test_the_newest_step_comes_first_and_filters_choose(sampled: StageFolder, tmp_path: Path) -> None:
    def steps_and_texts(*options: object) -> list[tuple[int, str]]:
        _, document = call("rollouts", "latest", "zero", "--runs", tmp_path, "--json", *options)
        return [(row["step"], row["text"]) for row in document["rows"]]

    assert [step for step, _ in steps_and_texts()] == [10] * 3 + [2] * 3 + [1] * 3
    assert {step for step, _ in steps_and_texts("--last", 2)} == {2, 10}
    assert steps_and_texts("--step", 2, "--verdict", "right") == [(2, "s2")]
    assert steps_and_texts("--verdict", "wrong", "--sort", "reward") == [(10, "longer"), (2, "longer"), (1, "longer")]
    assert steps_and_texts("--sort", "length", "--limit", 1) == [(10, "longer")]
    assert {text for _, text in steps_and_texts("--problem", "p1")} == {"longer"}
    _, document = call("rollouts", "a-1", "zero", "--runs", tmp_path, "--json", "--limit", 9)
    assert not document["more"]
    _, document = call("rollouts", "a-1", "zero", "--runs", tmp_path, "--json", "--limit", 8)
    assert document["more"]
    row = document["rows"][0]
    assert (row["tokens"], row["mean_logprob"], row["parts"], row["reference"]) == (3, -0.5, {"accuracy": 1.0}, "0")


def test_a_damaged_file_is_named_and_the_rest_is_read(
    sampled: StageFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sampled.rollouts / "step-000002.parquet").write_bytes(b"PAR1 torn")
    status, document = call("rollouts", "latest", "zero", "--runs", tmp_path, "--json")
    assert status == ExitStatus.MISTAKE
    assert {row["step"] for row in document["rows"]} == {1, 10}
    assert [line for line in capsys.readouterr().err.splitlines() if "step-000002" in line] == [f"r1: {document['damaged'][0]}"]


def test_a_copied_runs_folder_reads_its_own(sampled: StageFolder, tmp_path: Path) -> None:
    copy = tmp_path.rename(tmp_path.with_name(tmp_path.name + "-copy"))
    assert len(call("rollouts", "latest", "zero", "--runs", copy, "--json")[1]["rows"]) == 9


def test_refusals(sampled: StageFolder, tmp_path: Path) -> None:
    for stage, said in (("zeros", "did you mean `zero`"), ("later", "has not begun")):
        with pytest.raises(UserError, match=said):
            call("rollouts", "latest", stage, "--runs", tmp_path)
    for path in sampled.rollouts.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="recorded no answers"):
        call("rollouts", "latest", "zero", "--runs", tmp_path)
    with pytest.raises(UserError, match="--json"):
        call("rollouts", "latest", "zero", "--runs", tmp_path, "--json", "--follow")


def test_no_answer_controls_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = build_stage(tmp_path, RL)
    build_run(tmp_path, "a-1", {"zero": RL})
    path = write_answers(folder, 1, [(HOSTILE, "wrong", 0.0)])
    call("rollouts", "latest", "zero", "--runs", tmp_path)
    plain = capsys.readouterr().out
    from rich.console import Console

    screen = io.StringIO()
    rollouts._panels(Console(file=screen, force_terminal=True, width=200), rows_of(path))
    for shown in (plain, screen.getvalue()):
        assert "\\x1b]0;owned\\x07\\x1b[2J\\u202egnp\\u2066" in shown
        assert "[bold]loud[/bold] \\r| sample" in shown
        for forbidden in ("\x1b]", "\x07", "\x1b[2J", "\u202e", "\u2066", "\x9b", "\r"):
            assert forbidden not in shown
    assert [line for line in plain.splitlines() if line.startswith("  | ")] == [f"  | {printable(HOSTILE)}"]
    for line in ("\x9b", "\u202e", "\x7f", "\U000e0041"):
        assert printable_json(f'"{line}"').isascii()


def test_following_prints_what_comes_until_the_stage_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollouts, "POLL_SECONDS", 0.02)
    folder = build_stage(tmp_path, RL, finished=False)
    build_run(tmp_path, "a-1", {"zero": RL}, status="running")
    for step in (1, 2):
        write_answers(folder, step, [(f"old{step}", "right", 1.0)])

    follow, begun = rollouts._follow, threading.Event()

    def followed(*arguments: Any) -> Iterator[Any]:
        for row in follow(*arguments):
            begun.set()
            yield row

    monkeypatch.setattr(rollouts, "_follow", followed)

    def work() -> None:
        assert begun.wait(60)
        for step in (3, 4):
            time.sleep(0.1)
            write_answers(folder, step, [(f"new{step}", "right", 1.0)])
        folder.manifest.write_text("{}")

    worker = threading.Thread(target=work)
    worker.start()
    status, _ = call("rollouts", "latest", "zero", "--runs", tmp_path, "--follow")
    worker.join()
    texts = [line.strip(" |") for line in capsys.readouterr().out.splitlines() if line.startswith("  | ")]
    assert (status, texts) == (ExitStatus.DONE, ["old2", "new3", "new4"])


def test_a_panel_leaves_out_the_middle_of_an_answer_of_many_lines() -> None:
    text = "\n".join(map(str, range(rollouts.MOST_LINES + 1)))
    shortened = rollouts._shortened(text).split("\n")
    assert (shortened[0], shortened[-1]) == ("0", str(rollouts.MOST_LINES))
    assert [line for line in shortened if not line.isdigit()] == ["… 1 lines left out; `--json` has them …"]
    whole = text.rpartition("\n")[0]
    assert rollouts._shortened(whole) == whole
