"""One step off: whose weights draw a rollout, what a checkpoint keeps of it, and that its correction is on."""

import pytest
import torch
from pydantic import ValidationError

from stages.contract.errors import UserError
from stages.engine.deepspeed_engine import Engine
from stages.engine.scorer import TokenScorer
from stages.problems.episode import Problem
from stages.problems.templates import Template
from stages.problems.toy import ToySource, save_toy_tokenizer, toy_problems
from stages.rewards.score import Rewards
from stages.rl.collect import Scene
from stages.rl.one_step_off import Ahead
from stages.rl.problem_sampler import ProblemSampler
from stages.rl.settings import GRPO
from stages.rollout.protocol import Sampling
from stages.rollout.torch_engine import TorchRollout
from tests.conftest import tiny_llama

QUESTIONS, SAMPLES = 2, 3


class Place:
    def __init__(self, tokenizer, apart=True):
        self.policy = Engine(TokenScorer(tiny_llama().float()), GRPO(), "zero0", "cpu")
        self.scene = Scene(
            lambda: TorchRollout(self.policy.sampling_model(apart=apart), tokenizer),
            Template(name="question"),
            Sampling(max_tokens=9),
            Rewards(verifier="exact"),
            seed=0,
        )
        self.sampler = ProblemSampler(toy_problems(ToySource(source="toy", count=6)), QUESTIONS, seed=0)
        self.ahead = Ahead(self.scene, self.sampler, QUESTIONS, SAMPLES)

    def change(self):
        """What an update does to the weights."""
        with torch.no_grad():
            for parameter in self.policy.model.parameters():
                parameter.mul_(1.5)

    def drawn(self, step, position):
        """What the weights of now draw."""
        problems, _ = self.sampler.draw(position, QUESTIONS)
        return answers(self.scene.sample(problems, SAMPLES, "train", step))


def answers(groups):
    return [(e.problem.question, e.completion_ids, e.logprobs, e.scored.total) for group in groups for e in group.episodes]


@pytest.fixture
def tokenizer(tmp_path):
    return save_toy_tokenizer(tmp_path)


def test_a_rollout_is_of_the_policy_from_before_the_update(tokenizer):
    place = Place(tokenizer)
    first = place.drawn(0, 0)
    taken = place.ahead.take(0, 0)
    assert answers(taken.groups) == first
    assert taken.position == QUESTIONS
    before = place.drawn(1, taken.position)
    place.ahead.begin(1, taken.position)
    place.change()  # while it is sampled
    taken = place.ahead.take(1, taken.position)
    assert answers(taken.groups) == answers(taken.drawn) == before != place.drawn(1, QUESTIONS)
    assert taken.position == 2 * QUESTIONS
    place.ahead.begin(2, taken.position)
    assert answers(place.ahead.take(2, taken.position).groups) == place.drawn(2, 2 * QUESTIONS), (
        "the next is of the next policy"
    )
    place.ahead.end()


def test_weights_that_updates_reach_would_not_do(tokenizer):
    place = Place(tokenizer, apart=False)
    assert place.policy.sampling_model() is place.policy.model
    copied = place.policy.sampling_model(apart=True)
    place.change()
    pairs = zip(copied.parameters(), place.policy.model.parameters(), strict=True)
    assert not any(torch.equal(mine, theirs) for mine, theirs in pairs)
    pairs = zip(place.policy.sampling_model(apart=True).parameters(), place.policy.model.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_a_checkpoint_takes_the_rollout_that_is_under_way_along(tokenizer, tmp_path):
    place, record = Place(tokenizer), tmp_path / "step.parquet"
    assert place.ahead.save(record, main=True) is None
    assert not record.exists()
    place.ahead.begin(1, 2)
    position = place.ahead.save(record, main=True)
    kept = place.ahead.take(1, 2)
    place.change()
    resumed = Place(tokenizer)
    resumed.change()
    resumed.ahead.restore(record, position)
    found = resumed.ahead.take(1, 2)
    assert answers(found.groups) == answers(kept.groups) != resumed.drawn(1, 2)
    assert found.position == kept.position == 2 + QUESTIONS
    assert place.ahead.save(record, main=True) is None, "what was taken is not kept again"


def test_what_goes_wrong_while_sampling_ends_the_step(tokenizer):
    place = Place(tokenizer)
    sampler = ProblemSampler([Problem(id="0", question="", answer="", source="s")], 1, seed=0)
    ahead = Ahead(place.scene, sampler, 1, SAMPLES)
    ahead.begin(0, 0)
    with pytest.raises(UserError, match="is empty"):
        ahead.complete()


def test_it_is_corrected_by_default_and_goes_with_no_dynamic_sampling():
    assert GRPO().importance_cap is None
    assert GRPO(one_step_off=True).importance_cap == 2
    assert GRPO(one_step_off=True, importance_cap=None).importance_cap is None
    with pytest.raises(ValidationError, match="max_resamples"):
        GRPO(one_step_off=True, max_resamples=2)
