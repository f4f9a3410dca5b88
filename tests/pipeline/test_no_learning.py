"""A run whose RL stage learns nothing says so wherever its results are shown; a run with special tags does not score 0."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.commands import r1
from tests.doubles.scripted_model import answering, scripted_model, toy_tokenizer
from tests.tokenizers_by_kind import TAGS

pytestmark = pytest.mark.slow


def recipe(tmp_path, *answers, special=(), **stages):
    rows = [{"question": f"{a}+{b}=?", "answer": "3"} for a, b in ((1, 2), (2, 1), (3, 0), (0, 3), (4, 6), (5, 5))]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scripted_model(tmp_path / "model", toy_tokenizer(tmp_path / "model", special=special), answering(*answers))
    source = {"source": "file", "path": str(tmp_path / "problems.jsonl")}
    common = {"template": {"name": "question"}, "sampling": {"max_tokens": 10}, "rewards": {"verifier": "exact"}}
    document = {
        "name": "none",
        "runs": str(tmp_path / "runs"),
        "stages": {
            "base": {"kind": "model", "path": str(tmp_path / "model")},
            **{name: {**common, "held_out": {**source, "offset": 4}, **fields(source)} for name, fields in stages.items()},
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(document))
    return path, tmp_path / "runs"


def zero(source):
    facts = {"kind": "rl", "policy": "base", "problems": {**source, "limit": 4}, "kl": 0.0, "steps": 4, "questions": 2}
    return {**facts, "samples": 4, "evaluation": {"every": 4, "problems": 2}}


def test_it_is_said_on_the_terminal_in_status_in_the_report_and_in_mlflow(tmp_path):
    path, runs = recipe(tmp_path, "4", zero=zero)
    line = "zero: no group had a signal in 4 of 4 steps: the model is unchanged; no answer was right: give easier problems"
    done = r1("run", path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert line in done.stdout + done.stderr
    status = r1("status", "latest", "--runs", runs)
    assert line in status.stdout
    document = json.loads(r1("status", "latest", "--runs", runs, "--json").stdout)
    page = Path(document["report"]).read_text(encoding="utf-8")
    assert "no group had a signal in 4 of 4 steps" in page
    link = document["mlflow"]
    client = MlflowClient(link["tracking_uri"])
    (run_id,) = [stage["mlflow_run_id"] for stage in document["stages"] if stage["stage"] == "zero"]
    assert client.get_run(run_id).data.tags["r1.learning"] == "no_signal"
    again = r1("run", path, timeout=300)
    assert line in again.stdout + again.stderr  # a reused stage, too
    refused = r1("run", path, "--fresh", "zero", "--set", "stages.zero.health.stop=[no_signal]", timeout=300)
    assert refused.returncode == 2
    assert "no group had a signal in 4 of 4 steps: the model is unchanged" in refused.stderr


def test_special_tags_do_not_make_an_evaluation_0(tmp_path):
    path, _ = recipe(
        tmp_path, "3", special=TAGS, evaluation=lambda source: {"kind": "evaluate", "models": ["base"], "samples": 1}
    )
    done = r1("run", path, "--json", timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["models"]["base"]["accuracy"] == 1.0
