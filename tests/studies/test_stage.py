"""The stage `study` on reports made up here: what it reads, what it writes, and that the same results are the same bytes."""

import itertools
import json
import math
import random

import pytest

from stages.contract.errors import UserError
from stages.kinds import study
from stages.kinds.study import ArmInputs, StudyConfig
from stages.store.folders import StageFolder
from stages.store.stage import StageContext, StopRequest
from stages.studies import figures
from stages.studies.arms import Arm
from stages.studies.figures import averaged, facets
from stages.studies.settings import Comparison, Quantity, Slopes
from stages.studies.slopes import equal_kl_table

SEEDS = (0, 1, 2)
LEVEL = {"plain": 0.9, "taxed": 0.7}


def evaluation(folder, accuracy, length):
    folder.mkdir(parents=True)
    metrics = {"accuracy": accuracy, "accuracy_stderr": 0.02, "mean_length": length, "mean_length_right": length - 1}
    metrics |= {"format": 1.0, "truncated": 0.0, "cons_at_k": accuracy, "pass_at_2": 0.95, "pass_at_16": 0.99}
    (folder / "metrics.json").write_text(json.dumps(metrics | {"problems": 12.0, "samples": 16.0}))
    return folder


def training(folder, accuracy, seed, steps, slow=1.0):
    """What an RL stage leaves beside its model."""
    (folder / "model").mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        metrics = {
            "train/kl": 0.01 * step,
            "rollout/sampled_tokens": step * (100.0 + seed),
            "time/step": slow,
            "time/eval": 0.0,
        }
        if step % 2 == 0:
            metrics |= {"eval/accuracy": accuracy * step / steps, "eval/length": 20.0 + step}
        lines.append(json.dumps({"step": step, "of": 99, "time": 1, "metrics": metrics}) + "\n")
    (folder / "journal.jsonl").write_text("".join(lines))
    (folder / "manifest.json").write_text(json.dumps({"tokens": steps * 100, "peak_memory": round(slow * 2**30)}))
    return folder / "model"


@pytest.fixture
def given(tmp_path):
    """A study of two variants; the taxed one is worse, shorter, and costs twice as much."""
    rng = random.Random(0)
    inputs, arms = {}, {}
    start = evaluation(tmp_path / "base" / "report", 0.4, 19.0)
    for seed in SEEDS:
        for variant, level in LEVEL.items():
            name, accuracy = f"{variant}-s{seed}", level + rng.uniform(-0.02, 0.02)
            slow = 2.0 if variant == "taxed" else 1.0
            inputs[f"arms.{name}.trained"] = training(tmp_path / name, accuracy, seed, 6 + seed, slow)
            length = 30.0 if variant == "plain" else 24.0
            inputs[f"arms.{name}.report"] = evaluation(tmp_path / f"{name}-eval" / "report", accuracy, length + seed)
            inputs[f"arms.{name}.start"] = start
            arms[name] = ArmInputs(variant=variant, seed=seed, trained=name, report=f"{name}-eval", start="base-eval")
    plain, taxed = (Quantity(blocks=((v,),), words=v) for v in LEVEL)
    facts = {"of": plain, "direction": "above"}
    claims = {
        "better": Comparison(says="The tax costs accuracy.", metric="accuracy", than=taxed, **facts),
        "gain": Comparison(says="Training helps.", metric="accuracy", than="start", **facts),
        "shorter": Comparison(says="The tax shortens answers.", metric="mean_length", than=taxed, **facts),
        "wrong": Comparison(says="The tax is cheaper.", metric="seconds_per_step", than=taxed, **facts),
    }
    config = StudyConfig(kind="study", arms=arms, variants={v: {} for v in LEVEL}, claims=claims, left_out=("other",))
    return config, inputs


def run(config, inputs, folder):
    folder.mkdir()
    result = study.run(StageContext(config, StageFolder(folder), inputs, {}, StopRequest()))
    return result, folder / "report"


def test_the_report_says_what_was_measured(given, tmp_path):
    result, report = run(*given, tmp_path / "study")
    found = json.loads((report / "summary.json").read_text())
    assert {claim["name"]: claim["verdict"] for claim in found["claims"]} == {
        "better": "holds",
        "gain": "holds",
        "shorter": "holds",
        "wrong": "fails",
    }
    assert list(found["models"]) == ["base", "plain", "taxed"]
    plain = found["variants"]["plain"]
    assert (plain["mean_length"]["n"], plain["mean_length"]["mean"], plain["mean_length"]["sd"]) == (3, 31.0, 1.0)
    assert plain["train/kl"]["mean"] == pytest.approx(0.01 * (5.5 + 6.5 + 7.5) / 3), "the mean over the last quarter"
    assert found["models"]["plain"]["accuracy_stderr"] == pytest.approx(plain["accuracy"]["sd"] / 3**0.5)
    assert found["models"]["base"]["accuracy_stderr"] == 0.02
    assert (found["seeds"], found["claims_left_out"]) == ([0, 1, 2], ["other"])
    costs = json.loads((report / "costs.json").read_text())
    assert costs["peak_memory_mib"]["taxed"]["mean"] == 2048
    assert "| taxed | 2 ± 0 | 2.00 | 2048.0 ± 0 | 2.00 |" in (report / "costs.md").read_text()
    page = (report / "study.md").read_text()
    assert "| base | 40.0 % | 19.0 | 18.0 |" in page
    assert "- left out, for it needs variants that were left out: other\n" in page
    assert "31.0 ± 2.48 (sd 1)" in page
    assert "- holds: The tax costs accuracy. (accuracy: plain " in page
    assert "| 99.0 % ± 0.0 |" in page, "pass@16"
    assert "seconds a step" not in page
    assert all((report / name).read_bytes().startswith(b"\x89PNG") for name in ("learning.png", "final.png"))
    assert result.remarks[1].startswith("holds: Training helps. (accuracy: plain ")
    assert result.metrics["taxed/mean_length"] == 25.0


def test_the_same_results_are_the_same_bytes(given, tmp_path):
    reports = [run(*given, tmp_path / name)[1] for name in ("one", "other")]
    files = sorted(path.name for path in reports[0].iterdir())
    assert files == ["costs.json", "costs.md", "final.png", "learning.png", "study.md", "summary.json"]
    assert all((reports[0] / name).read_bytes() == (reports[1] / name).read_bytes() for name in files)


def test_one_seed_is_a_study_without_verdicts(given, tmp_path):
    config, inputs = given
    one = config.model_copy(update={"arms": {name: arm for name, arm in config.arms.items() if arm.seed == 0}})
    result, report = run(one, inputs, tmp_path / "study")
    found = json.loads((report / "summary.json").read_text())
    assert {claim["verdict"] for claim in found["claims"]} == {"undecided"}
    assert found["models"]["plain"]["accuracy_stderr"] == 0.02, "over problems, as there is nothing else"
    assert "one seed has no interval" in result.remarks[0]


@pytest.fixture
def factorial(tmp_path):
    """place × weight × two coefficients, a tenfold apart: with the KL in the reward length falls by 4 + seed, in the loss by 1;
    constant weights take 2 more, in the reward alone."""
    inputs, arms, levels = {}, {}, {}
    start = evaluation(tmp_path / "base" / "report", 0.4, 19.0)
    for place, weight, kl in itertools.product(("loss", "reward"), ("mean", "constant"), ("low", "high")):
        variant = f"{place}-{weight}-{kl}"
        levels[variant] = {"place": place, "weight": weight, "coefficient": kl}
        for seed in SEEDS:
            name, fall = f"{variant}-s{seed}", 1.0 if place == "loss" else 4.0 + seed + 2.0 * (weight == "constant")
            inputs[f"arms.{name}.trained"] = training(tmp_path / name, 0.9, seed, 6)
            length = 30.0 + seed - (fall if kl == "high" else 0.0)
            inputs[f"arms.{name}.report"] = evaluation(tmp_path / f"{name}-eval" / "report", 0.9, length)
            inputs[f"arms.{name}.start"] = start
            arms[name] = ArmInputs(variant=variant, seed=seed, trained=name, report=f"{name}-eval", start="base-eval")
    slopes = Slopes(
        against="kl",
        log=True,
        x={variant: {"low": -2.0, "high": -1.0}[has["coefficient"]] for variant, has in levels.items()},
        blocks=tuple((f"{p}-{w}-low", f"{p}-{w}-high") for p in ("loss", "reward") for w in ("mean", "constant")),
    )
    return StudyConfig(kind="study", arms=arms, variants=levels, slopes=(slopes,)), inputs


def test_slopes_of_a_factorial_stand_by_combination_by_level_and_by_factor(factorial, tmp_path):
    _, report = run(*factorial, tmp_path / "study")
    page = (report / "study.md").read_text()
    _, after = page.split("Slopes against kl: the change for ten times the setting")
    table = [line.split(" | ")[:2] for line in after.split("\n\nAt an equal KL")[0].split("\n| ")]
    # ± by hand: three seeds that differ by 1 have sd 1, and 4.303 / sqrt(3) = 2.48
    assert table[3:] == [
        ["loss · mean", "-1 ± 0"],
        ["loss · constant", "-1 ± 0"],
        ["reward · mean", "-5 ± 2.48"],
        ["reward · constant", "-7 ± 2.48"],
        ["all of place loss", "-1 ± 0"],
        ["all of place reward", "-6 ± 2.48"],
        ["place: reward less loss", "-5 ± 2.48"],
        ["all of weight mean", "-3 ± 1.24"],
        ["all of weight constant", "-4 ± 1.24"],
        ["weight: constant less mean", "-1 ± 0"],
    ]
    assert page.count("![slopes](slopes-1.png)") == 1
    assert (report / "slopes-1.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_factor_does_at_an_equal_kl_is_told_apart_from_the_kl(factorial):
    """Accuracy is made of the KL alone, length of the KL, the place (2 longer in the reward) and nothing else."""
    config, _ = factorial
    (slopes,), arms = config.slopes, []
    rng = random.Random(3)
    for seed in SEEDS:
        for variant, has in config.variants.items():
            for _ in range(2):
                kl = 10 ** rng.uniform(-3, -1) * (0.2 if has["place"] == "reward" else 1.0)
                length = 40 + 5 * math.log10(kl) - math.log10(kl) ** 2 + 2.0 * (has["place"] == "reward")
                arms.append(Arm(variant, seed, "base", metrics={"train/kl": kl, "mean_length": length, "accuracy": 0.9}))
    table = equal_kl_table(slopes, arms, config.variants)
    assert "explain at least 100.0 % of the variance" in table
    assert table.splitlines()[2] == "| at equal KL | length | accuracy, points |"
    place, weight = (line.split(" | ") for line in table.splitlines()[4:])
    assert place[0] == "| place: reward less loss"
    assert float(place[1].split(" ± ")[0]) == pytest.approx(2.0)
    assert weight[0] == "| weight: constant less mean"
    assert float(weight[1].split(" ± ")[0]) == pytest.approx(0.0, abs=1e-9)
    assert equal_kl_table(slopes, arms[:7], config.variants) == "", "too few arms to fit"
    assert equal_kl_table(slopes.model_copy(update={"against": "lr"}), arms, config.variants) == ""


def test_a_line_of_the_slopes_figure_is_a_combination_with_its_seeds_interval(factorial, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_png", lambda figure: drawn.append(figure) or b"")
    run(*factorial, tmp_path / "study")
    length = drawn[-1].axes[0]
    assert (length.get_title(), length.get_xlabel()) == ("length", "kl")
    assert [text.get_text() for text in length.get_xticklabels()] == ["0.01", "0.1"]
    lines = {bars.get_label(): bars.lines[0].get_ydata() for bars in length.containers}
    assert list(lines) == ["loss · mean", "loss · constant", "reward · mean", "reward · constant"]
    assert list(lines["reward · mean"]) == [31.0, 26.0]
    (whiskers,) = length.containers[2].lines[2]
    assert next(segment[:, 1].tolist() for segment in whiskers.get_segments()) == pytest.approx(
        [31 - 2.484, 31 + 2.484], abs=1e-3
    )
    *_, kl = drawn[-1].axes
    assert [panel.get_title() for panel in drawn[-1].axes] == [
        "length",
        "length, right",
        "accuracy, %",
        "length by the KL reached",
    ]
    # the journal's KL is 0.01 a step, so over the last quarter of six, 2 of them, 0.055; each seed's arm is a dot
    dots = [dot for line in kl.lines for dot in zip(*line.get_data(), strict=True)]
    assert len(dots) == 8 * len(SEEDS)
    assert {round(x, 6) for x, _ in dots} == {0.055}
    assert sorted(y for line in kl.lines[2:3] for y in line.get_ydata()) == [26, 26, 26, 30, 31, 32]
    assert [text.get_text() for text in kl.get_legend().get_texts()] == list(lines)


def test_a_report_that_is_gone_is_named(given, tmp_path):
    config, inputs = given
    (inputs["arms.plain-s1.report"] / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"plain-s1-eval.*not a readable report"):
        run(config, inputs, tmp_path / "study")


def test_curves_are_averaged_where_all_of_them_are():
    at, mean, sd = averaged([[(0, 1.0), (4, 5.0)], [(1, 4.0), (3, 6.0), (8, 6.0)]])
    assert (at[0], at[-1]) == (1, 4)
    assert (mean[0], mean[-1]) == pytest.approx((3.0, 5.5))  # (2 + 4) / 2 and (5 + 6) / 2
    assert sd[0] == pytest.approx(2**0.5)
    assert averaged([[(None, 1.0)], [(1, 4.0)]]) is None
    assert averaged([[(0, 1.0), (1, 1.0)], [(2, 4.0)]]) is None
    assert averaged([[]]) is None


def test_a_factorial_is_drawn_by_all_factors_but_the_last():
    found = facets({"none": {}, "a-x": {"f": "a", "k": "x"}, "a-y": {"f": "a", "k": "y"}, "b-x": {"f": "b", "k": "x"}})
    assert found == [("", {"none": "none"}), ("a", {"a-x": "x", "a-y": "y"}), ("b", {"b-x": "x"})]
