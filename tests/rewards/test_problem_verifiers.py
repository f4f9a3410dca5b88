"""A verifier for each source of problems: mixtures are judged part by part, and unjudged answers train on their other parts."""

from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from stages.contract.config import semantic
from stages.contract.errors import UserError
from stages.curation.settings import CurateConfig
from stages.engine.packing.pack import micro_batches
from stages.evals.headline import problem_metrics
from stages.kinds import curate, evaluate_model, rl
from stages.kinds.evaluate_model import EvaluateModelConfig
from stages.problems.episode import Episode, Group, Problem
from stages.problems.gym import GymSource
from stages.problems.sources import FileSource, HubSource, MixtureSource, Part, load_problem_set, verifiers_asked
from stages.problems.toy import ToySource
from stages.recipe.resolve import load_recipe
from stages.rewards.answers.verifiers import Asked, canaries_missed, judge, used
from stages.rewards.score import Rewards, same_answer, score
from stages.rl.metrics import held_out_metrics, reward_metrics, rewards_of, rollout_metrics
from stages.rl.prepare import prepare
from stages.rl.settings import GRPO
from stages.rl.train import Trainer
from stages.rollout.records import SCHEMA, _read, read_groups, write_groups
from stages.store.folders import StageFolder
from tests.conftest import ROOT
from tests.problems.test_problems import jsonl
from tests.requirements import require

POEMS = {"a poem": 0.25, "a worse poem": -1.0, "5": 0.0, "6": 0.0}
"""What the preference model of these tests says of an answer that ends in the text."""


@pytest.fixture
def liked(monkeypatch):
    """Rewards with a preference model that knows `POEMS`."""

    def preferences(_model, episodes):
        return [POEMS[e.text.rpartition("</think>")[2].removeprefix("<answer>").removesuffix("</answer>")] for e in episodes]

    monkeypatch.setattr("stages.rewards.preference.preferences", preferences)
    model = {"path": "nowhere"}
    return Rewards(verifier="exact", accuracy=1.0, format=0.5, preference=2.0, preference_model=model)


def formed(answer):
    return f"<think>so</think><answer>{answer}</answer>"


def group(problem, *texts, cut=()):
    finishes = ["length" if n in cut else "stop" for n in range(len(texts))]
    made = [
        Episode(problem, n, "q", [1], [2, 3], [0.0, 0.0], text, finish)
        for n, (text, finish) in enumerate(zip(texts, finishes, strict=True))
    ]
    return Group(problem, made)


def scored(rewards, *groups):
    score(rewards, [e for g in groups for e in g.episodes], max_tokens=8, key="")
    return groups


def general(**more):
    return Problem("g:1", "write a poem", "", "g", verifier="unjudged", **more)


def poems(*texts, cut=()):
    return group(general(), *texts, cut=cut)


# --- sources ---


def mixture(tmp_path, *verifiers):
    """A part of four problems for each verifier, called by its place."""
    parts = []
    for place, verifier in enumerate(verifiers):
        rows = [{"question": f"{place} {n}"} | ({} if verifier == "unjudged" else {"answer": n}) for n in range(4)]
        path = str(jsonl(tmp_path / f"{place}.jsonl", *rows))
        parts.append(Part(weight=1, problems=FileSource(path=path, verifier=verifier)))
    return MixtureSource(parts=tuple(parts))


def test_the_parts_of_a_mixture_have_their_verifiers(tmp_path):
    source = mixture(tmp_path, None, "math", "unjudged")
    problems = load_problem_set(source, "problems").problems
    assert {(p.source, p.verifier) for p in problems} == {("0", None), ("1", "math"), ("2", "unjudged")}
    assert len(problems) == 12
    assert [p.judged for p in sorted(problems, key=lambda p: p.source)] == [True] * 8 + [False] * 4
    assert verifiers_asked(source) == {None, "math", "unjudged"}
    toy = ToySource(source="toy", count=2, verifier="numeric")
    assert {p.verifier for p in load_problem_set(toy, "p").problems} == {"numeric"}


def test_an_unjudged_source_needs_no_answer_and_takes_one_that_is_there(tmp_path):
    rows = [
        {"question": "a"},
        {"question": "b", "answer": "x"},
        {"question": "c", "answer": None},
        {"question": "d", "answer": []},
    ]
    path = str(jsonl(tmp_path / "general.jsonl", *rows, {"answer": "x"}))
    found = load_problem_set(FileSource(path=path, verifier="unjudged"), "problems")
    assert [(p.question, p.answer) for p in found.problems] == [("a", ""), ("b", "x"), ("c", ""), ("d", "")]
    assert found.refused == {"no column `question`": 1}
    for way in ({"extract": "number"}, {"extract": "boxed"}, {"answer_after": "####"}, {"answer_pattern": "z"}):
        assert len(load_problem_set(FileSource(path=path, verifier="unjudged", **way), "problems").problems) == 4
    for verifier in (None, "exact"):
        assert len(load_problem_set(FileSource(path=path, verifier=verifier), "problems").problems) == 1
    only = str(jsonl(tmp_path / "other.jsonl", {"text": "a"}))
    with pytest.raises(UserError, match="`problems` wants the columns `question`; the columns are: text"):
        load_problem_set(FileSource(path=only, verifier="unjudged"), "problems")


def test_the_verifier_is_in_the_fingerprint_once_it_is_said():
    sources = (FileSource(path="x"), HubSource(name="x"), GymSource(task="x", count=1), ToySource(source="toy", count=1))
    for source in sources:
        assert "verifier" not in semantic(source)
        assert semantic(source.model_copy(update={"verifier": "exact"}))["verifier"] == "exact"


# --- judging ---


def test_each_part_is_judged_by_its_own_verifier_all_at_once(monkeypatch):
    calls = []

    def recording(name, verdict):
        def judged(asked, _rewards):
            calls.append((name, [a.answer for a in asked]))
            return [verdict] * len(asked)

        return judged

    for name, verdict in (("exact", "right"), ("math", "wrong"), ("numeric", "none")):
        monkeypatch.setattr(f"stages.rewards.answers.judges.{name}", recording(name, verdict))
    names = ["math", None, "unjudged", "numeric", "math", None]
    asked = [Asked(Problem(str(n), "q", "5", "s", verifier=name), str(n)) for n, name in enumerate(names)]
    assert judge(asked, Rewards(verifier="exact")) == ["wrong", "right", "unjudged", "none", "wrong", "right"]
    assert calls == [("exact", ["1", "5"]), ("numeric", ["3"]), ("math", ["0", "4"])]


def test_a_mixture_of_math_gym_and_general_prompts(tmp_path, liked):
    require("reasoning-gym")
    gym = GymSource(task="chain_sum", count=1, verifier="reasoning_gym")
    (made,) = load_problem_set(gym, "problems").problems
    stated = formed(made.answer)
    math = Problem("m:1", "q", "5", "m", verifier="math")
    exact = Problem("e:1", "q", "5", "e")
    rewards = liked.model_copy(update={"preference": 0.0, "preference_model": None, "verify_timeout_s": 20.0})
    groups = scored(
        rewards,
        group(math, formed("5.0"), formed("6")),
        group(exact, formed("5.0"), formed("5")),
        group(made, stated, formed("no number")),
        poems(formed("a poem"), "a poem", "cut", cut={2}),
    )
    verdicts = [[e.scored.verdict for e in g.episodes] for g in groups]
    assert verdicts == [["right", "wrong"], ["wrong", "right"], ["right", "wrong"], ["unjudged"] * 3]
    # accuracy 1.0, format 0.5
    assert [[e.scored.total for e in g.episodes] for g in groups] == [[1.5, 0.5], [0.5, 1.5], [1.5, 0.5], [0.5, 0.0, 0.0]]
    assert not any("accuracy" in e.scored.parts for e in groups[3].episodes)
    # Read back they are what was written, the verifiers with them.
    write_groups(tmp_path / "mixed.parquet", groups)
    assert read_groups(tmp_path / "mixed.parquet") == list(groups)
    write_groups(tmp_path / "plain.parquet", groups[1:2])
    assert _read(tmp_path / "plain.parquet").schema.equals(SCHEMA)


def test_a_vote_compares_with_the_problems_verifier():
    rewards = Rewards(verifier="exact")
    assert same_answer("5", "5.0", rewards, "math") and not same_answer("5", "5.0", rewards)
    assert not same_answer("5", "5.0", Rewards(verifier="math"), "reasoning_gym")
    # Two write 7 in two ways: together they outvote the right answer.
    (answers,) = scored(rewards, group(Problem("m:1", "q", "5", "m", verifier="math"), formed("5"), formed("7"), formed("7.0")))
    assert problem_metrics(answers, rewards)["cons_at_k"] == 0.0


# --- unjudged answers in training ---


def test_totals_of_unjudged_answers_by_hand(liked):
    general_, judged = scored(
        liked,
        poems(formed("a poem"), "<think>so</think>a worse poem", formed("a poem"), cut={2}),
        group(Problem("e:1", "q", "5", "e"), formed("5"), formed("6")),
    )
    # 0.5 × format + 2 × preference; a cut answer has no format, and is liked as the least liked one.
    assert [e.scored.total for e in general_.episodes] == [0.5 + 2 * 0.25, 2 * -1.0, 2 * -1.0]
    assert [e.scored.total for e in judged.episodes] == [1.5, 0.5]


def test_a_gate_on_accuracy_is_open_for_an_unjudged_answer(liked):
    gated = liked.model_copy(update={"gates": {"preference": "accuracy"}})
    (found,) = scored(gated, poems(formed("a poem"), "a worse poem"))
    assert [e.scored.total for e in found.episodes] == [1.0, -2.0]
    # Other gates are what they were: shut where they were not measured, or are not 1. What is below 0 stays.
    gated = liked.model_copy(update={"gates": {"preference": "format", "format": "random"}})
    (found,) = scored(gated, poems(formed("a poem"), "a worse poem"))
    assert [e.scored.total for e in found.episodes] == [0.5, -2.0]


class Whole:
    rank, world_size = 0, 1

    def equalise(self, micro, filler):
        return micro

    def micro_batches(self, texts, tokens):
        return micro_batches(texts, tokens, self.rank, self.world_size)


def test_unjudged_answers_train_on_their_other_parts(liked):
    groups = scored(
        liked,
        poems(formed("a poem"), "a worse poem"),
        group(Problem("e:1", "q", "5", "e"), formed("5"), formed("6")),
    )
    assert rewards_of(groups)[1].all()
    prepared = prepare(groups, GRPO(kl=0.0), Whole(), seed=0, step=0, temperature=1.0, max_tokens=8)
    advantages = {
        (a.episode.problem.id, a.episode.sample): float(a.advantages[0]) for b in prepared.minibatches for a in b.answers
    }
    # Of two answers the better has 1/√2 in units of the std.
    assert advantages == pytest.approx(
        {("g:1", 0): 0.5**0.5, ("g:1", 1): -(0.5**0.5), ("e:1", 0): 0.5**0.5, ("e:1", 1): -(0.5**0.5)}, rel=1e-3
    )


def test_unjudged_answers_are_in_no_number_about_right_and_wrong(liked, monkeypatch):
    groups = scored(
        liked,
        poems(formed("a poem"), "a worse poem"),
        group(Problem("n:1", "q", "n/a", "n", verifier="numeric"), formed("5"), formed("6")),
        group(Problem("e:1", "q", "5", "e"), formed("5"), formed("6")),
    )
    found = rollout_metrics(groups) | reward_metrics([e for g in groups for e in g.episodes])
    assert found["rollout/no_verdict"] == 2 / 4
    assert found["rollout/pass_at_k"] == held_out_metrics(groups)["eval/pass_at_k"] == 1 / 2
    assert found["reward/accuracy"] == 1 / 4
    assert found["reward/format"] == 5 / 6
    alone = rollout_metrics(groups[:1]) | held_out_metrics(groups[:1])
    missing = {"rollout/no_verdict", "rollout/pass_at_k", "rollout/length_wrong", "eval/accuracy", "eval/pass_at_k"}
    assert not missing & alone.keys()
    assert alone["eval/reward"] == (1.0 - 2.0) / 2
    # Only where a function of the user's says nothing is the reward unknown.
    monkeypatch.setattr("stages.rewards.score.function_parts", lambda _rewards, episodes: [None] * len(episodes))
    (lost,) = scored(liked, poems(formed("a poem")))
    assert lost.episodes[0].scored.verdict == "none"
    assert rollout_metrics([lost])["rollout/no_verdict"] == 1
    assert rollout_metrics([Group(general(), [*lost.episodes, groups[0].episodes[0]])])["rollout/no_verdict"] == 1 / 2


# --- what is checked before a stage begins ---


def test_the_verifiers_that_a_stage_uses():
    assert used([None, "code", "unjudged", "exact"], "math") == ["exact", "math", "code"]
    assert used(["unjudged"], "math") == [] and used(["exact"], "code") == ["exact"]


def test_canaries_of_every_verifier_that_is_used(monkeypatch):
    rewards = Rewards(verifier="exact")
    assert canaries_missed(rewards, ["exact", "numeric"]) == [] == canaries_missed(rewards, [])
    monkeypatch.setattr("stages.rewards.answers.judges.numeric", lambda asked, rewards: ["wrong"] * len(asked))
    missed = canaries_missed(rewards, ["exact", "numeric"])
    assert missed == ["`$5.00` for `5` is wrong, not right", "`5` for `n/a` is wrong, not none"]
    assert canaries_missed(rewards) == []


def test_training_watches_the_canaries_of_its_problems_verifiers(tmp_path, monkeypatch):
    train, held_out = mixture(tmp_path, "exact", "unjudged"), ToySource(source="toy", count=2, verifier="numeric")
    rewards = Rewards(verifier="math")
    config = rl.RLConfig(kind="rl", policy="p", problems=train, held_out=held_out, rewards=rewards, questions=4)
    folder = StageFolder(tmp_path / "stage")
    context = SimpleNamespace(config=config, inputs={}, rank=0, world_size=1, main=True, folder=folder)
    problems, kept_back = (load_problem_set(source, "p").problems for source in (train, held_out))
    trainer = Trainer(context, SimpleNamespace(device="cpu"), None, problems, kept_back)
    assert trainer.verifiers == ["exact", "numeric"]
    monkeypatch.setattr("stages.rewards.answers.judges.numeric", lambda asked, rewards: ["wrong"] * len(asked))
    assert trainer._watch().see(config.health.canary_every, {})["health/canaries_missed"] == 2


def test_a_source_of_programs_wants_the_sandbox_before_anything_is_loaded(tmp_path, monkeypatch):
    def no_sandbox(_settings):
        raise UserError("no sandbox", where="rewards.sandbox", mend="install it")

    monkeypatch.setattr("stages.rewards.settings.ready", no_sandbox)
    programs, plain = mixture(tmp_path, None, "code"), mixture(tmp_path, None)
    stages = (
        (rl.run, rl.RLConfig(kind="rl", policy="p", problems=programs, held_out=plain)),
        (rl.run, rl.RLConfig(kind="rl", policy="p", problems=plain, held_out=programs)),
        (curate.run, CurateConfig(kind="curate", sampler="p", problems=programs)),
        (evaluate_model.run, EvaluateModelConfig(kind="evaluate_model", model="p", held_out=programs)),
    )
    for run, config in stages:
        with pytest.raises(UserError, match="no sandbox"):
            run(SimpleNamespace(config=config, folder=None))
    # A stage whose sources all name another verifier judges no programs, whatever its own is.
    assert Rewards(verifier="code").remarks(["exact"]) == []


GENERAL = "{source: file, path: README.md, verifier: unjudged}"
MIXED = f"{{source: mixture, parts: [{{weight: 1, problems: {{source: toy, count: 5}}}}, {{weight: 1, problems: {GENERAL}}}]}}"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (f"stages.evaluation.held_out={MIXED}", r"evaluation.*held_out\.parts\.1\.problems is unjudged, so there is nothing"),
        (
            f"stages.cold_start_data.problems={GENERAL}",
            "cold_start_data.*problems is unjudged, and only right answers are kept",
        ),
        (f"stages.zero.problems={MIXED}", r"zero.*problems\.parts\.1\.problems is unjudged.*give `rewards.preference`"),
        (f"stages.zero.held_out={GENERAL}", r"zero.*held_out is unjudged.*give `rewards.preference`"),
        (
            f"stages.zero.problems={GENERAL.replace('}', ', pass_rate: {path: README.md, low: 0, high: 1}}')}",
            "problems.*unjudged problems have no pass rate",
        ),
        ("stages.zero.problems={source: toy, count: 5, verifier: maths}", r"problems\.verifier.*did you mean `math`"),
    ],
)
def test_what_unjudged_problems_are_no_good_for_is_refused_in_one_line(changes, says, monkeypatch):
    monkeypatch.chdir(ROOT)
    rewards = "stages.zero.rewards={accuracy: 1, format: 0, language: 0}"
    with pytest.raises(UserError, match=says) as error:
        load_recipe(ROOT / "configs/quickstart.yaml", [changes, rewards])
    assert "\n" not in str(error.value)


def test_unjudged_problems_with_a_part_that_pays_are_taken(tmp_path):
    paid = Rewards(accuracy=1.0, format=0.0, preference=1.0, preference_model={"path": "x"})
    source = mixture(tmp_path, "exact", "unjudged")
    rl.RLConfig(kind="rl", policy="p", problems=source, held_out=source, rewards=paid)
    with pytest.raises(ValidationError, match="can earn nothing but accuracy"):
        rl.RLConfig(kind="rl", policy="p", problems=source, held_out=source, rewards=Rewards(format=0.0))
