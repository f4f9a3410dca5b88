"""Gates: bounds worked out by hand, how often chance passes them, and the stage that hands a model on."""

import json
import math
import os

import numpy as np
import pytest

from flows.pipeline.gates import heed
from stages.contract.config import semantic
from stages.contract.errors import GateClosed, UserError
from stages.evals.gates import bounds, in_words, judge
from stages.kinds.gate import KIND, GateConfig, hand_on
from stages.recipe.resolve import load_recipe, resolve
from stages.store.files import digest_path
from stages.store.folders import StageFolder
from stages.store.manifest import Manifest
from stages.store.stage import StageContext, StopRequest
from tests.conftest import ROOT


def test_the_bound_is_student_s_with_one_more_problem_lost():
    # 50 of 100 differences are 1, and one more is -1: mean 49/101, variance (51 - 49²/101)/100; t(0.95, 100) = 1.660234
    low, high = bounds([1.0] * 50 + [0.0] * 50, 0.95)
    assert low == pytest.approx(49 / 101 - 1.660234 * math.sqrt((51 - 49**2 / 101) / 100 / 101), abs=1e-6)
    # or one more is 1: mean 51/101
    assert high == pytest.approx(51 / 101 + 1.660234 * math.sqrt((51 - 51**2 / 101) / 100 / 101), abs=1e-6)


def test_a_standard_error_of_nothing_proves_only_what_so_many_problems_can():
    low, high = bounds([0.0] * 100, 0.95)
    assert (low, high) == pytest.approx((-2.660234 / 101, 2.660234 / 101), abs=1e-6)  # mean and error are both 1/101
    # If one problem in so many were lost, 100 would have none of them 5 % of the time: nearly the same.
    assert low == pytest.approx(-(1 - 0.05 ** (1 / 100)), rel=0.11)
    assert bounds([1.0] * 100, 0.95) == pytest.approx((1 - 2 * 2.660234 / 101, 1.0), abs=1e-6)
    assert bounds([1.0], 0.95) == (-1.0, 1.0)


def rows(values):
    return {f"p{i}": value for i, value in enumerate(values)}


def test_verdicts():
    better, worse = rows([1.0] * 40 + [0.5] * 40), rows([0.5] * 80)
    found = judge(better, worse, 0.0, 0.95)
    assert (found.verdict, found.difference, found.model, found.against, found.problems) == ("passed", 0.25, 0.75, 0.5, 80)
    assert found.stderr == pytest.approx(math.sqrt(0.0625 / 79))
    assert judge(better, worse, 0.3, 0.95).verdict == "undecided"
    assert judge(better, worse, 0.4, 0.95).verdict == "failed"
    assert judge(worse, better, 0.0, 0.95).verdict == "failed"
    assert judge(worse, worse, 0.0, 0.95).verdict == "undecided"  # the same everywhere: not better
    assert judge(worse, worse, -0.05, 0.95).verdict == "passed"  # and not worse by 5 points: 3/80 is less
    assert judge(worse, worse, -0.03, 0.95).verdict == "undecided"
    assert judge(rows([1.0]), rows([0.0]), 0.0, 0.95).verdict == "undecided"  # one problem tells nothing
    with pytest.raises(ValueError, match="different problems"):
        judge(rows([1.0, 1.0]), rows([1.0]), 0.0, 0.95)


def test_words():
    found = judge(rows([1.0] * 40 + [0.5] * 40), rows([0.5] * 80), 0.0, 0.95)
    said = in_words(found, "accuracy", 0.95, margin=0.0, tolerance=None)
    assert said == "accuracy 75.0 % against 50.0 %: +25.0 ± 2.8 points, better beyond the sampling error (95 %, 80 problems)"
    found = judge(rows([0.5] * 80), rows([0.5] * 80), -0.01, 0.95)
    said = in_words(found, "accuracy", 0.95, margin=None, tolerance=0.01)
    assert "+0.0 ± 0.0 points, within the sampling error: may be worse by 1 points" in said


def sampled(rng, chances, samples):
    return rng.binomial(samples, chances) / samples


def equal_models(rng, n, samples, hard):
    """Two models of the same skill: most problems are sure, a share of them are a coin's."""
    chances = np.where(rng.random(n) < hard, rng.random(n), 1.0)
    return sampled(rng, chances, samples) - sampled(rng, chances, samples)


def a_little_worse(rng, n, tolerance):
    """A model that fails where the other does not, on just the tolerated share of problems."""
    return -(rng.random(n) < tolerance).astype(float)


@pytest.mark.parametrize(
    ("draw", "threshold"),
    [
        (lambda rng: equal_models(rng, 12, 2, 1.0), 0.0),
        (lambda rng: equal_models(rng, 30, 1, 1.0), 0.0),
        (lambda rng: equal_models(rng, 200, 2, 0.03), 0.0),
        (lambda rng: equal_models(rng, 200, 4, 1.0), 0.0),
        (lambda rng: a_little_worse(rng, 50, 0.03), -0.03),
        (lambda rng: a_little_worse(rng, 400, 0.03), -0.03),
    ],
)
def test_chance_passes_a_gate_as_seldom_as_was_asked_for(draw, threshold):
    rng, tries = np.random.default_rng(7), 1500
    passed = sum(bounds(draw(rng).tolist(), 0.95)[0] > threshold for _ in range(tries))
    # 5 %, and three times the error of such a count
    assert passed / tries <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / tries)


def test_what_is_better_passes():
    rng, tries = np.random.default_rng(7), 200
    chances = rng.random(200) * 0.6
    passed = sum(
        bounds((sampled(rng, chances + 0.15, 2) - sampled(rng, chances, 2)).tolist(), 0.95)[0] > 0 for _ in range(tries)
    )
    assert passed / tries > 0.95  # 15 points of better, standard error 3.4


@pytest.fixture
def context(tmp_path):
    """A gate's stage with its inputs: a model and two reports."""
    model = tmp_path / "zero" / "model"
    (model / "sub").mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "sub" / "config.json").write_text("{}")
    inputs = {"model": model}
    for role, value in (("model", 1.0), ("against", 0.5)):
        report = tmp_path / role / "report"
        report.mkdir(parents=True)
        problems = {f"p{i}": {"accuracy": value, "format": 1.0} for i in range(60)}
        (report / "problems.json").write_text(json.dumps(problems))
        inputs[f"reports.{role}"] = report
    folder = StageFolder(tmp_path / "stages" / "gate-x")
    folder.path.mkdir(parents=True)
    config = GateConfig(kind="gate", model="zero", better_than="base")
    return StageContext(config, folder, inputs, {}, StopRequest())


def test_the_stage_hands_on_the_very_model(context):
    result = KIND.run(context)
    given = context.folder.output("model")
    assert digest_path(given) == digest_path(context.inputs["model"])
    assert (given / "model.safetensors").stat().st_nlink == 2  # no second copy of the weights
    note = result.notes["gate"]
    assert {"verdict", "metric", "model", "against", "difference", "stderr", "confidence", "says"} <= note.keys()
    assert (note["verdict"], note["model"], note["against"], note["difference"]) == ("passed", "zero", "base", 0.5)
    assert result.remarks == [f"passed: {note['says']}"]
    assert result.metrics["accuracy"] == 1.0
    assert result.metrics["accuracy_against"] == 0.5


def test_weights_are_copied_where_there_can_be_no_links(context, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    hand_on(context.inputs["model"], tmp_path / "copy")
    assert digest_path(tmp_path / "copy") == digest_path(context.inputs["model"])


def test_reports_that_cannot_be_compared_are_named(context):
    file = context.inputs["reports.against"] / "problems.json"
    file.write_text(json.dumps({"other": {"accuracy": 1.0}}))
    with pytest.raises(UserError, match="different problems"):
        KIND.run(context)
    file.write_text(json.dumps({"p0": {"format": 1.0}}))
    with pytest.raises(UserError, match="not a readable report about each problem's accuracy"):
        KIND.run(context)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "exactly one of"),
        ({"better_than": "a", "not_worse_than": "b"}, "exactly one of"),
        ({"better_than": "zero"}, "with itself"),
        ({"better_than": "a", "tolerance": 0.1}, "`tolerance` belongs"),
        ({"not_worse_than": "a", "margin": 0.1}, "`margin` belongs"),
    ],
)
def test_mistakes(fields, said):
    with pytest.raises(ValueError, match=said):
        GateConfig(kind="gate", model="zero", **fields)


@pytest.mark.parametrize(
    ("otherwise", "undecided", "stopped"),
    [
        ("stop", None, {"failed", "undecided"}),
        ("warn", None, set()),
        ("stop", "warn", {"failed"}),
        ("warn", "stop", {"undecided"}),
    ],
)
def test_what_stops_a_run(otherwise, undecided, stopped):
    config = GateConfig(kind="gate", model="zero", better_than="base", otherwise=otherwise, undecided=undecided)
    assert {v for v in ("passed", "failed", "undecided") if config.stops(v)} == stopped


def test_a_run_heeds_the_verdict_of_the_manifest_as_the_recipe_of_today_wants_it():
    note = {"verdict": "undecided", "says": "numbers"}
    manifest = Manifest.model_construct(notes={"gate": note})
    told = []
    progress = type("Told", (), {"note": lambda _, text: told.append(text)})()
    stop = GateConfig(kind="gate", model="zero", better_than="base")
    with pytest.raises(GateClosed, match=r"`zero` better than `base`: undecided; numbers.*--set stages.g.otherwise=warn"):
        heed("g", stop, manifest, "run-1", progress.note)
    heed("g", stop.model_copy(update={"otherwise": "warn"}), manifest, "run-1", progress.note)
    assert told == ["g: `zero` better than `base`: undecided; numbers; the run goes on"]


def test_what_follows_from_a_verdict_is_no_part_of_the_computation():
    config = GateConfig(kind="gate", model="zero", better_than="base")
    assert semantic(config) == semantic(config.model_copy(update={"otherwise": "warn", "undecided": "stop", "model": "z"}))
    assert semantic(config) != semantic(config.model_copy(update={"margin": 0.1}))


def test_a_resolved_recipe_is_read_again_as_it_was():
    recipe = load_recipe(ROOT / "configs" / "quickstart-gates.yaml")
    assert resolve(recipe.document).stages == recipe.stages
    assert recipe.stages["zero_gate"].threshold == 0.0
    assert recipe.stages["reasoning_gate"].threshold == -0.03


def test_a_gate_stands_between_a_model_and_what_is_made_of_it():
    recipe = load_recipe(ROOT / "configs" / "quickstart-gates.yaml")
    order = list(recipe.stages)
    assert order.index("evaluation.zero") < order.index("zero_gate") < order.index("cold_start_data")
    assert order.index("evaluation.reasoning") < order.index("reasoning_gate")
    with pytest.raises(UserError, match=r"no stage `other\.zero`"):
        load_recipe(ROOT / "configs" / "quickstart-gates.yaml", ["stages.zero_gate.evaluation=other"])
