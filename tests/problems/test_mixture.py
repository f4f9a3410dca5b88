"""Weighted mixtures, and filters by measured pass rate."""

import json
from collections import Counter

import pytest

from stages.contract.config import external_paths
from stages.contract.errors import UserError
from stages.problems.episode import Episode, Group, Reward
from stages.problems.mixture import shares_of
from stages.problems.pass_rate import PassRate
from stages.problems.sources import FileSource, MixtureSource, Part, load_problem_set, load_problems
from stages.problems.toy import ToySource
from stages.recipe.resolve import load_recipe
from stages.rollout.records import write_groups
from tests.conftest import ROOT
from tests.problems.test_problems import jsonl


def source(tmp_path, name, count, **more):
    return FileSource(
        path=str(jsonl(tmp_path / f"{name}.jsonl", *({"question": f"{name} {i}", "answer": i} for i in range(count)))), **more
    )


def mixture(*parts, **more):
    return MixtureSource(parts=tuple(Part(weight=weight, problems=problems) for weight, problems in parts), **more)


def test_a_mixture_has_the_shares_of_its_weights_and_says_so(tmp_path):
    a, b = source(tmp_path, "a", 50), source(tmp_path, "b", 90)
    found = load_problem_set(mixture((1, a), (3, b), count=100), "problems")
    assert Counter(p.source for p in found.problems) == {"a": 25, "b": 75}
    assert found.parts == {"a": (25, 50), "b": (75, 90)}
    assert found.remarks("problems") == ["problems: a mixture of 100 (25 of 50 × a, 75 of 90 × b)"]
    assert len({p.id for p in found.problems}) == 100
    # Mixed, not one part after the other: both halves have some of each.
    assert {p.source for p in found.problems[:50]} == {p.source for p in found.problems[50:]} == {"a", "b"}


def test_a_mixture_depends_on_its_seed_alone(tmp_path):
    a, b = source(tmp_path, "a", 50), ToySource(source="toy", count=20)
    first, again, other = (load_problems(mixture((2, a), (1, b), count=30, seed=s), "problems") for s in (1, 1, 2))
    assert first == again and first != other
    assert [p.id for p in first] != [p.id for p in other] and Counter(p.source for p in other)["a"] == 20


def test_without_a_count_a_mixture_is_as_large_as_its_weights_allow(tmp_path):
    a, b = source(tmp_path, "a", 10), source(tmp_path, "b", 1000)
    assert load_problem_set(mixture((1, a), (4, b)), "problems").parts == {"a": (10, 10), "b": (40, 1000)}
    with pytest.raises(UserError, match=r"problems\.parts\.0: 20 problems are to come from it, it has 10"):
        load_problem_set(mixture((1, a), (4, b), count=100), "problems")


def test_shares_by_largest_remainder():
    assert shares_of([1, 1, 1], [9, 9, 9], 10, "p") == [4, 3, 3]
    assert shares_of([0.5, 0.3, 0.2], [99, 99, 99], 7, "p") == [4, 2, 1]  # 3.5, 2.1, 1.4
    assert shares_of([1, 2], [5, 5], None, "p") == [2, 5]  # of 7 they get 2.33 and 4.67
    with pytest.raises(UserError, match="too few problems"):
        shares_of([1, 1], [0, 5], None, "p")


def test_a_question_of_two_parts_is_asked_once_and_files_of_one_name_are_told_apart(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    first = jsonl(tmp_path / "x/train.jsonl", *({"question": f"q{i}", "answer": i} for i in range(6)))
    second = jsonl(tmp_path / "y/train.jsonl", *({"question": f"q{i}", "answer": i} for i in range(4, 12)), "{")
    found = load_problem_set(mixture((1, FileSource(path=str(first))), (1, FileSource(path=str(second)))), "problems")
    assert sorted(p.question for p in found.problems) == sorted(f"q{i}" for i in range(12))
    assert found.filtered == {"asked in an earlier part": 2} and found.refused == {"not JSON": 1}
    assert len({p.id for p in found.problems}) == 12 and found.parts == {"train": (6, 6), "train (part 2)": (6, 6)}


def test_a_mixture_in_a_recipe(tmp_path):
    a = source(tmp_path, "a", 5)
    parts = f"{{weight: 1, problems: {{source: file, path: {a.path}}}}}, {{weight: 2, problems: {{source: toy, count: 9}}}}"
    text = f"{{source: mixture, seed: 3, parts: [{parts}]}}"
    zero = load_recipe(ROOT / "configs/quickstart.yaml", [f"stages.zero.problems={text}"]).stages["zero"]
    assert external_paths(zero) == {"problems.parts.0.problems.path": a.path}
    assert Counter(p.source for p in load_problems(zero.problems, "problems")) == {"a": 4, "toy train": 9}
    with pytest.raises(UserError, match=r"stages\.zero\.problems\.parts\.1.*did you mean `count`"):
        load_recipe(ROOT / "configs/quickstart.yaml", [f"stages.zero.problems={text.replace('count', 'cuont')}"])


RATES = {"a 0": 0.0, "a 1": 0.2, "a 2": 0.5, "a 3": 0.8, "a 4": 1.0}


def test_problems_within_the_bounds_are_kept(tmp_path):
    rates = jsonl(tmp_path / "rates.jsonl", *({"question": q, "pass_rate": r} for q, r in RATES.items()))
    rate = PassRate(path=str(rates), low=0.2, high=0.8)
    found = load_problem_set(source(tmp_path, "a", 7, pass_rate=rate), "problems")
    assert [p.question for p in found.problems] == ["a 1", "a 2", "a 3"]
    assert found.filtered == {"pass rate below 0.2": 1, "pass rate above 0.8": 1, "pass rate unknown": 2}
    assert found.remarks("problems") == [
        "problems: 4 problems filtered out (1 × pass rate below 0.2, 1 × pass rate above 0.8, 2 × pass rate unknown)"
    ]
    kept = PassRate(path=str(rates), low=0.2, high=0.8, unmeasured="keep")
    assert [p.question[2:] for p in load_problems(source(tmp_path, "a", 7, pass_rate=kept), "p")] == list("12356")
    # The filter comes before `offset` and `limit`.
    part = load_problems(source(tmp_path, "a", 7, pass_rate=rate, offset=1, limit=1), "p")
    assert [p.question for p in part] == ["a 2"]


def test_rates_by_id_of_several_rows_and_under_other_names(tmp_path):
    rows = [{"name": "a:1", "acc": 1}, {"name": "a:1", "acc": 0}, {"name": "a:2", "acc": 1.0}]
    rate = PassRate(path=str(jsonl(tmp_path / "r.jsonl", *rows)), low=0.5, high=0.9, id="name", rate="acc")
    assert [p.id for p in load_problems(source(tmp_path, "a", 3, pass_rate=rate), "p")] == ["a:1"]


def answers(problem, *verdicts):
    group = Group(problem)
    for number, verdict in enumerate(verdicts):
        reward = Reward(1.0, {"accuracy": 1.0}, verdict)
        group.episodes.append(Episode(problem, number, "p", [1], [2], [0.0], "t", "stop", reward))
    return group


def test_rates_of_a_finished_stage_are_right_answers_among_those_judged(tmp_path):
    problems = load_problems(source(tmp_path, "a", 4), "p")
    rollouts = tmp_path / "rollouts"
    rollouts.mkdir()
    write_groups(
        rollouts / "chunk-00000.parquet", [answers(problems[0], "right", "wrong", "none"), answers(problems[1], "none")]
    )
    write_groups(rollouts / "chunk-00001.parquet", [answers(problems[2], "right", "right"), answers(problems[3], "wrong")])
    rate = PassRate(path=str(rollouts), low=0.5, high=0.5)
    found = load_problem_set(source(tmp_path, "a", 4, pass_rate=rate), "problems")
    assert [p.question for p in found.problems] == ["a 0"]
    assert found.filtered == {"pass rate unknown": 1, "pass rate above 0.5": 1, "pass rate below 0.5": 1}
    with pytest.raises(UserError, match=f"name {rollouts}"):
        load_problems(source(tmp_path, "a", 4, pass_rate=PassRate(path=str(tmp_path), low=0, high=1)), "p")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"question": "a 1", "pass_rate": 2}], "line 1: no rate from 0 to 1 in column `pass_rate`"),
        ([{"question": "a 1"}], "no rate from 0 to 1"),
        (
            [{"task": "a 1", "pass_rate": 0.5}],
            "no problem is named in `question` or `problem_id`; the columns are: pass_rate, task",
        ),
        (["{"], "line 1: not JSON"),
        ([{"question": "b 1", "pass_rate": 0.5}], "none of the 1 problems with a pass rate is one of the source's"),
        ([{"question": "a 1", "pass_rate": 0.9}], "no problem has a pass rate in these bounds"),
    ],
)
def test_rates_that_cannot_be_used_stop_the_run(tmp_path, rows, says):
    path = jsonl(tmp_path / "r.jsonl", *rows)
    with pytest.raises(UserError, match=says):
        load_problems(source(tmp_path, "a", 3, pass_rate=PassRate(path=str(path), low=0.2, high=0.8)), "problems")


def test_bounds_in_order_and_nothing_else(tmp_path):
    with pytest.raises(ValueError, match="low is larger than high"):
        PassRate(path="x", low=0.8, high=0.2)
    assert json.loads(PassRate(path="x", low=0, high=1).model_dump_json())["unmeasured"] == "leave_out"
