"""Advantages and whole steps, from TRL's whole way from prompts to a scored batch, and from ours."""

import pytest
import torch

from stages.rl.advantages import EPSILON, batch_whitened, group, group_centred, leave_one_out
from stages.rl.kl import ESTIMATORS
from stages.rl.losses import truncated_importance
from tests.peers.trl_material import (
    ANSWERS,
    GROUPS,
    RELATIVE,
    SAMPLES,
    Material,
    agree,
    generated,
    load,
    ours,
    row,
    scaled,
    score,
    theirs,
)

pytestmark = pytest.mark.peers


# Advantages, from TRL's whole way from prompts to a scored batch.


REWARDS = {
    "fractions": [[1.0, 0.25, -0.5, 2.0], [0.125, 0.0, 0.75, 0.5], [5.0, 1.0, 2.5, 2.25]],
    "right or wrong": [[1, 0, 0, 0], [1, 1, 1, 0], [0, 1, 0, 1]],
    "without signal": [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1]],
    "without verdict": [[1, None, 0, 0.5], [None, 0.25, 1, None], [0, 1, 1, None]],
    "one verdict, and none": [[1, None, None, None], [None, None, None, None], [0.5, 0, 1, 0]],
}


def advantages(build, rewards, kind="GRPO", **settings):
    """TRL's advantages, (groups, G), and our rewards and validity."""
    flat = [reward for one in rewards for reward in one]
    built = build(kind, rewards=flat, **settings)
    found = generated(built, Material(built.model).texts)["advantages"].double()
    # What stands where there is no verdict must not matter: 7.
    values = torch.tensor([7.0 if reward is None else reward for reward in flat], dtype=torch.float64)
    valid = torch.tensor([reward is not None for reward in flat])
    return tuple(one.view(len(rewards), -1) for one in (found, values, valid))


def close(found, expected):
    assert expected.any()
    print(f"relative error of the advantages {float((found - expected).norm() / expected.norm()):.1e}")
    torch.testing.assert_close(found, expected, rtol=RELATIVE, atol=1e-7)


@pytest.mark.parametrize("kind", REWARDS)
@pytest.mark.parametrize("name", ["group", "group_centred", "leave_one_out"])
def test_advantages(name, kind, trainer):
    trl, function = {
        "group": ({"scale_rewards": "group"}, group),
        "group_centred": ({"scale_rewards": "none"}, group_centred),
        "leave_one_out": ({"kind": "RLOO", "beta": 0.0}, leave_one_out),
    }[name]
    expected, rewards, valid = advantages(trainer, REWARDS[kind], **trl)
    close(function(rewards, valid), expected)


@pytest.mark.parametrize("kind", REWARDS)
def test_advantages_over_the_batch(kind, trainer):
    # TRL's "batch" divides by the std of the rewards, questions' differences included; ours by that of the centred ones.
    expected, rewards, valid = advantages(trainer, REWARDS[kind], scale_rewards="batch")
    found, centred = batch_whitened(rewards, valid), group_centred(rewards, valid)
    close(found * (centred[valid].std() + EPSILON), expected * (rewards[valid].std() + EPSILON))
    if kind == "fractions":
        assert (found - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("kind", ["fractions", "right or wrong", "without signal"])
def test_advantages_whitened(kind, trainer):
    # TRL's nearest to ours: RLOO's, normalised. They are G/(G − 1) of the centred ones, so only the 1e-4 weighs differently.
    expected, rewards, valid = advantages(trainer, REWARDS[kind], kind="RLOO", beta=0.0, normalize_advantages=True)
    std = group_centred(rewards, valid).std()
    found = batch_whitened(rewards, valid)
    close(found * (std + EPSILON), expected * (std + EPSILON * (SAMPLES - 1) / SAMPLES))
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("reward", [0.1, 0.4, 0.7])
def test_equal_rewards_that_are_no_binary_fractions(reward, trainer):
    # TRL's float32 mean of equal rewards is not always the reward; over a std of almost 0 that is an advantage. Ours is 0.
    expected, rewards, valid = advantages(trainer, [[reward] * ANSWERS], scale_rewards="group", num_generations=ANSWERS)
    print(f"largest of TRL's advantages {float(expected.abs().max()):.1e}")
    assert expected.abs().max() < 1e-2
    assert not group(rewards, valid).any()


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("why", ["cut at the limit", "without verdict"])
def test_answers_that_are_left_out(why, loss_type, saved, trainer):
    # We count the others alone. TRL counts all answers, and all tokens of those without verdict (whose KL it keeps as well).
    left, model = (1, 6), load(saved)
    material = Material(model, cut=left if why == "cut at the limit" else ())
    flat = [reward for one in REWARDS["fractions"] for reward in one]
    if why == "without verdict":
        flat = [None if number in left else reward for number, reward in enumerate(flat)]
    settings = {"mask_truncated_completions": why == "cut at the limit", "loss_type": loss_type, "epsilon": 0.2}
    built = trainer(rewards=flat, **settings)
    inputs = generated(built, material.texts) | {"old_per_token_logps": material.padded()["old_per_token_logps"]}
    material.advantages = inputs["advantages"]
    kept = material.only([number for number in range(ANSWERS) if number not in left])
    scale = len(kept.lengths) / ANSWERS
    if loss_type == "dapo":
        scale = 1 if why == "cut at the limit" else sum(kept.lengths) / sum(material.lengths)
    agree(scaled(ours(model, kept, row(loss_type, kl=0.0, clip_high=0.2)), scale), theirs(built, inputs))


# A whole step: TRL scores the answers, then the policy moves, then the losses are compared.


def moved(*models):
    """The same step away from the policy that sampled, on each of the models."""
    for model in models:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * parameter.std() * torch.randn(parameter.shape, generator=generator))


def rows_of(padded, lengths):
    return [line[:length] for line, length in zip(padded, lengths, strict=True)]


def same(found, expected):
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=RELATIVE, atol=1e-5)


def test_a_whole_step_of_grpo(saved, trainer):
    flat = [reward for one in REWARDS["fractions"] for reward in one]
    built = trainer(
        rewards=flat,
        loss_type="grpo",
        epsilon=0.2,
        beta=0.04,
        use_bias_correction_kl=True,
        temperature=0.8,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=1.2,
    )
    built.use_vllm = True
    model = load(saved)
    material = Material(model)
    moved(built.ref_model)  # else the KL is 0
    reference = load(saved)
    moved(reference)
    inputs = generated(built, material.texts, [logp.tolist() for logp in material.sampler])

    material.old = [logp.detach() for logp in score(model, material.texts, 0.8)]
    material.reference = [logp.detach() for logp in score(reference, material.texts, 0.8)]
    material.advantages = group(torch.tensor(flat, dtype=torch.float64).view(GROUPS, SAMPLES)).flatten().float()
    same(material.old, rows_of(inputs["old_per_token_logps"], material.lengths))
    same(material.reference, rows_of(inputs["ref_per_token_logps"], material.lengths))
    capped = [truncated_importance(old, sampler, 1.2) for old, sampler in zip(material.old, material.sampler, strict=True)]
    same(capped, rows_of(inputs["importance_sampling_ratio"], material.lengths))
    torch.testing.assert_close(material.advantages, inputs["advantages"], rtol=RELATIVE, atol=0)

    moved(model, built.model)
    found = ours(model, material, row("grpo", kl=0.04), temperature=0.8, correction=True, cap=1.2)
    agree(found, theirs(built, inputs))
    assert any(clip for _, clip in found.low)
    assert any(clip for _, clip in found.high)


def test_a_whole_step_of_rloo_with_the_kl_in_the_reward(saved, trainer):
    flat = [reward for one in REWARDS["fractions"] for reward in one]
    built = trainer("RLOO", rewards=flat, epsilon=0.2, beta=0.05)
    model, reference = load(saved), load(saved)
    moved(built.ref_model, reference)
    material = Material(model)
    inputs = generated(built, material.texts)

    material.old = material.now
    references = [logp.detach() for logp in score(reference, material.texts, 1.0)]
    penalty = torch.stack([ESTIMATORS["k1"](*pair).sum() for pair in zip(material.old, references, strict=True)])
    rewards = torch.tensor(flat, dtype=torch.float64) - 0.05 * penalty
    material.advantages = leave_one_out(rewards.view(GROUPS, SAMPLES)).flatten().float()
    torch.testing.assert_close(material.advantages, inputs["advantages"], rtol=RELATIVE, atol=1e-6)

    moved(model, built.model)
    found = ours(model, material, row("rloo", ratio="product"))
    agree(found, theirs(built, inputs))
    assert any(clip for _, clip in found.low + found.high)
