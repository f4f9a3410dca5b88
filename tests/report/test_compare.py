"""Runs beside each other: differences with their errors, and the figure."""

from pathlib import Path

import pytest
from PIL import Image

from stages.contract.errors import UserError
from stages.report.differences import differences
from stages.report.facts import read_run
from stages.report.figure import compared, write_figure, write_own_figure
from stages.store.files import write_json
from tests.report.report_material import MadeRun, journal


def test_differences_are_taken_problem_by_problem(tmp_path: Path) -> None:
    first = MadeRun(tmp_path / "runs")
    second = MadeRun(tmp_path / "runs", right={"base": [1, 0, 2], "zero": [4, 4, 3]})
    runs = [read_run(made.write()) for made in (first, second)]
    found = differences(runs)
    name = runs[1].name
    assert found["base"]["accuracy"][name] == {"difference": 0.0, "stderr": 0.0, "problems": 3, "beyond_error": False}
    # zero: 0, 1/2, 3/4 more: mean 5/12, sd 0.3819 over sqrt(3)
    zero = found["zero"]["accuracy"][name]
    assert zero["difference"] == pytest.approx(5 / 12)
    assert zero["stderr"] == pytest.approx(0.2204793)
    assert zero["beyond_error"] is False
    third = read_run(MadeRun(tmp_path / "runs", right={"base": [4, 4, 4], "zero": [4, 4, 4]}).write())
    assert differences([runs[0], third])["base"]["accuracy"][third.name]["beyond_error"] is True


def test_other_problems_are_not_compared(tmp_path: Path) -> None:
    runs = [MadeRun(tmp_path / "runs"), MadeRun(tmp_path / "runs")]
    folder = Path(runs[1].content["stages"]["evaluation.zero"]["folder"])
    write_json(folder / "config.json", {"config": {"held_out": {"source": "toy", "count": 4}}, "inputs": {}})
    assert list(differences([read_run(made.write()) for made in runs])) == ["base"]
    (folder / "report" / "problems.json").write_text("[")
    with pytest.raises(UserError, match=r"problems\.json: not a readable report"):
        differences([read_run(made.write()) for made in runs])


def test_the_figure_has_a_colour_for_each_run_in_every_panel(tmp_path: Path) -> None:
    made = [MadeRun(tmp_path / "runs", lr=lr) for lr in (1e-4, 2e-4, 3e-4)]
    alone = made[0].stage("alone", "sft")
    journal(alone, 4, {"train/loss": 1.0})
    two = [run.stage("two", "sft") for run in (made[0], made[2])]
    for folder in two:
        journal(folder, 4, {"train/loss": 1.0, "eval/loss": 2.0})
    runs = [read_run(run.write()) for run in made]
    blocks = dict(compared(runs))
    assert list(blocks) == ["base", "zero", "two"]
    titles = [panel.title for panel in blocks["zero"]]
    assert titles == ["eval/accuracy", "reward/accuracy", "reward/total", "rollout/length", "train/kl", "train/loss"]
    for panel in blocks["zero"]:
        assert [(c.label, c.colour) for c in panel.curves] == [(run.name, n) for n, run in enumerate(runs)]
    assert [c.colour for c in blocks["two"][0].curves] == [0, 2]
    path = tmp_path / "new" / "figure.png"
    assert write_figure(runs, path)
    with Image.open(path) as image:
        assert image.size[0] > 1500
        colours = image.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    there = {colour for _, colour in colours}
    assert {(0x2F, 0x6D, 0xB3), (0xC8, 0x62, 0x2A), (0x3D, 0x8F, 0x5F)} <= there


def test_the_figure_of_one_run_has_a_line_for_each_training_stage(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "runs")
    journal(made.stage("two", "sft"), 4, {"train/loss": 1.0, "eval/loss": 2.0})
    run, path = read_run(made.write()), tmp_path / "figure.png"
    assert write_own_figure(run, path)
    with Image.open(path) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
    trained = [stage.name for stage in run.stages if stage.trained]
    assert trained == ["base", "zero", "two"]
    assert {(0x2F, 0x6D, 0xB3), (0xC8, 0x62, 0x2A), (0x3D, 0x8F, 0x5F)} <= colours
    run.stages = [stage for stage in run.stages if not stage.trained]
    assert not write_own_figure(run, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_runs_without_a_shared_stage_have_no_figure(tmp_path: Path) -> None:
    made = [MadeRun(tmp_path / "runs") for _ in range(3)]
    made[1].content["stages"] = {"other": made[1].content["stages"]["zero"]}
    runs = [read_run(run.write()) for run in made]
    path = tmp_path / "figure.png"
    assert not write_figure(runs[:2], path)
    assert not path.exists()
    with pytest.raises(UserError, match="--figure"):
        write_figure([runs[0], runs[2]], Path("/proc/none/figure.png"))
