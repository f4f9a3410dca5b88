"""Drawing problems, dynamic sampling, and what its choice may not touch."""

import random
import threading

import pytest

from stages.contract.errors import UserError
from stages.engine import distributed
from stages.problems.episode import Problem
from stages.problems.templates import Template
from stages.rewards.score import Rewards, score
from stages.rl.collect import Scene, collect, has_signal
from stages.rl.metrics import rollout_metrics
from stages.rl.problem_sampler import ProblemSampler
from stages.rollout.protocol import Completion, Sampling


@pytest.fixture(scope="module", autouse=True)
def rank():
    distributed.join("cpu")


class Scripted:
    """Answers as the question says: `right`, `wrong`, or `mixed` (every second answer right)."""

    def __init__(self):
        self.asked = []

    def encode(self, prompt):
        return tuple(ord(letter) for letter in prompt)

    def sample(self, requests, sampling, *, seed, purpose, step, done=None):
        self.asked.append([request.key for request in requests])

        def answer(request, number):
            right = "right" in request.key or ("mixed" in request.key and number % 2)
            return Completion([1], [-0.5], f"<think>x</think> <answer>{'a' if right else 'b'}</answer>", "stop")

        for number, request in enumerate(requests):
            done(number, [answer(request, n) for n in range(request.samples)])


def problems(*kinds):
    return [Problem(id=f"{n}", question=f"{kind}{n}", answer="a", source="s") for n, kind in enumerate(kinds)]


def scene(rollout):
    rewards = Rewards(verifier="exact")
    return Scene(lambda: rollout, Template(name="question"), Sampling(max_tokens=8), rewards, seed=0)


def taken(given, questions, max_resamples):
    rollout = Scripted()
    sampler = ProblemSampler(given, questions, seed=0)
    found = collect(scene(rollout), sampler, 0, questions=questions, samples=4, step=0, max_resamples=max_resamples)
    return rollout, found


def test_without_dynamic_sampling_every_group_stays():
    rollout, found = taken(problems("right", "wrong", "mixed", "mixed"), 3, 0)
    assert len(rollout.asked) == 1
    assert len(found.groups) == len(found.drawn) == found.position == 3
    assert found.resamples == 0


def test_dynamic_sampling_draws_until_every_group_has_a_signal():
    given = problems(*["right", "wrong"] * 6, *["mixed"] * 8)
    rollout, found = taken(given, 6, 20)
    assert len(found.groups) == 6
    assert all("mixed" in group.problem.question for group in found.groups)
    asked = [key for batch in rollout.asked for key in batch]
    assert len(set(asked)) == len(asked) == len(found.drawn) == found.position  # no problem twice in a step
    assert found.resamples == len(rollout.asked) - 1 > 0
    # What is asked for is what lacks, and no more.
    kept = 0
    for batch in rollout.asked:
        assert len(batch) == min(6 - kept, len(given))
        kept += sum("mixed" in key for key in batch)


def test_the_engine_is_made_fresh_once_and_rests_once_whatever_is_drawn_again():
    made, given = [], problems(*["right", "wrong", "mixed"] * 4)
    stage = scene(Scripted())
    stage.rollout = lambda: made.append("fresh") or Scripted()
    stage.rest = lambda: made.append("rest")
    sampler = ProblemSampler(given, 3, seed=0)
    for max_resamples in (0, 5):
        made.clear()
        found = collect(stage, sampler, 0, questions=3, samples=4, step=0, max_resamples=max_resamples)
        assert made == ["fresh", "rest"]
    assert found.resamples > 0
    made.clear()
    stage.sample(given[:2], 1, "held_out", 0)
    assert made == ["fresh", "rest"]


def test_the_cap_ends_the_drawing():
    _, found = taken(problems(*["right"] * 20), 2, 3)
    assert (len(found.groups), len(found.drawn), found.resamples, found.position) == (0, 8, 3, 8)


def test_when_all_problems_are_drawn_the_step_makes_do():
    _, found = taken(problems("right", "wrong", "mixed"), 2, 9)
    assert [group.problem.question for group in found.groups] == ["mixed2"]
    assert len(found.drawn) == 3


def test_metrics_are_of_all_that_was_drawn():
    given = problems(*["right"] * 10, *["mixed"] * 2)
    _, found = taken(given, 2, 20)
    metrics = rollout_metrics(found.drawn)
    right = sum("right" in group.problem.question for group in found.drawn)
    assert right > 0
    assert metrics["rollout/zero_variance"] == right / len(found.drawn)
    assert metrics["rollout/pass_at_k"] == 1.0


def test_a_signal_is_a_difference_of_rewards():
    _, found = taken(problems("right", "mixed", "wrong"), 3, 0)
    assert {group.problem.question: has_signal(group) for group in found.groups} == {
        "right0": False,
        "mixed1": True,
        "wrong2": False,
    }


def drawn(sampler, steps, count):
    position, found = 0, []
    for _ in range(steps):
        chosen, position = sampler.draw(position, count)
        found.append([problem.id for problem in chosen])
    return found


def test_no_problem_comes_twice_in_an_epoch_and_epochs_differ():
    sampler = ProblemSampler(problems(*"x" * 11), per_step=4, seed=0)  # two steps an epoch, three problems wait
    found = drawn(sampler, 40, 4)
    for epoch in range(20):
        assert len(set(found[2 * epoch] + found[2 * epoch + 1])) == 8
    assert found[0] != found[2]
    assert {i for step in found for i in step} == {str(i) for i in range(11)}


def test_more_questions_than_problems_are_refused():
    with pytest.raises(UserError, match="a step draws 4 different problems, there are 3"):
        ProblemSampler(problems(*"xxx"), per_step=4, seed=0)


def test_a_draw_is_a_function_of_the_position_alone():
    sampler = ProblemSampler(problems(*"x" * 10), per_step=4, seed=3)
    places = [0, 4, 10, 14, 20]
    forward = {place: sampler.draw(place, 4) for place in places}
    for place in reversed(places):
        assert ProblemSampler(problems(*"x" * 10), per_step=4, seed=3).draw(place, 4) == forward[place]
    assert ProblemSampler(problems(*"x" * 10), per_step=4, seed=4).draw(0, 4) != forward[0]


def test_a_further_draw_passes_over_what_the_step_has():
    sampler = ProblemSampler(problems(*"x" * 6), per_step=4, seed=1)
    first, position = sampler.draw(0, 4)
    more, position = sampler.draw(position, 3, taken=first)  # only two are left, over the end of the epoch
    assert len(more) == 2
    assert {p.id for p in first + more} == {str(i) for i in range(6)}
    assert sampler.draw(position, 1, taken=first + more) == ([], position)


def test_however_often_a_step_draws_it_has_no_problem_twice():
    rng = random.Random(0)
    for size in (5, 6, 7):
        sampler = ProblemSampler(problems(*"x" * size), per_step=3, seed=size)
        position = 0
        for _ in range(200):
            step, position = sampler.draw(position, 3)
            for _ in range(rng.randrange(3)):
                more, position = sampler.draw(position, rng.randrange(1, 4), taken=step)
                step += more
            assert len({p.id for p in step}) == len(step)


def test_what_is_complete_is_judged_while_the_rest_is_sampled(monkeypatch):
    judged = threading.Event()

    def scored(rewards, episodes, **given):
        score(rewards, episodes, **given)
        judged.set()

    class Slow(Scripted):
        def sample(self, requests, sampling, *, seed, purpose, step, done=None):
            super().sample(requests[:1], sampling, seed=seed, purpose=purpose, step=step, done=done)
            assert judged.wait(10), "the first group waits for the second"
            super().sample(requests[1:], sampling, seed=seed, purpose=purpose, step=step, done=lambda n, got: done(n + 1, got))

    monkeypatch.setattr("stages.rl.collect.score", scored)
    groups = scene(Slow()).sample(problems("right", "wrong"), 2, "train", 0)
    assert [[e.scored.verdict for e in group.episodes] for group in groups] == [["right"] * 2, ["wrong"] * 2]


def test_what_fails_while_judging_is_not_lost(monkeypatch):
    def broken(*_given, **_more):
        raise RuntimeError("no verifier")

    monkeypatch.setattr("stages.rl.collect.score", broken)
    with pytest.raises(RuntimeError, match="no verifier"):
        scene(Scripted()).sample(problems("right", "wrong"), 2, "train", 0)
