"""The same tensors through TRL's own trainers and through ours: the same losses, gradients and advantages.

TRL's `_compute_loss` and `_generate_and_score_completions` are called as they are; only the drawing of answers is replaced.
Where the two define a thing differently, the exact relation between the definitions is asserted instead.
TRL is imported when a test runs, not when this file is read: who does not run `make peers` does not have it.
"""

from dataclasses import replace

import pytest
import torch

from stages.rl.algorithms import PRESETS
from tests.peers.trl_material import ANSWERS, GROUPS, PAD, SAMPLES, Material, agree, errors, load, ours, row, scaled, theirs

pytestmark = pytest.mark.peers


# Each case: TRL's settings, our row of the table, our further settings, the sides of the clip that must bind.
CASES = {
    "grpo": ({"loss_type": "grpo", "epsilon": 0.2}, row("grpo", kl=0.0), {}, "low high"),
    "grpo, at a temperature": (
        {"loss_type": "grpo", "epsilon": 0.2, "temperature": 0.7},
        row("grpo", kl=0.0),
        {"temperature": 0.7},
        "low high",
    ),
    "grpo, KL": (
        {"loss_type": "grpo", "epsilon": 0.2, "beta": 0.04, "use_bias_correction_kl": False},
        row("grpo", kl=0.04),
        {},
        "low high",
    ),
    "grpo, KL with the ratio": (
        {"loss_type": "grpo", "epsilon": 0.2, "beta": 0.04, "use_bias_correction_kl": True},
        row("grpo", kl=0.04),
        {"correction": True},
        "low high",
    ),
    # ε 10 never binds below; policies this far apart are what makes it bind above.
    "grpo, R1's ε and β": (
        {"loss_type": "grpo", "epsilon": 10.0, "beta": 0.001, "use_bias_correction_kl": False},
        row("grpo", **PRESETS["r1"]),
        {"distance": 2.0},
        "high",
    ),
    "grpo, dual clip": (
        {"loss_type": "grpo", "epsilon": 0.2, "delta": 3.0},
        row("grpo", kl=0.0),
        {"dual": 3.0, "distance": 1.0},
        "low high dual",
    ),
    "dr_grpo": ({"loss_type": "dr_grpo", "epsilon": 0.2}, row("dr_grpo"), {}, "low high"),
    "dapo": ({"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}, row("dapo"), {}, "low high"),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        row("gspo"),
        {},
        "low high",
    ),
    "gspo, KL": (
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.05,
            "beta": 0.04,
            "use_bias_correction_kl": False,
        },
        row("gspo", clip_low=0.05, clip_high=0.05, kl=0.04),
        {},
        "low high",
    ),
    # TRL takes the bound itself, we what it lies above 1.
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, row("cispo"), {"distance": 2.0}, "high"),
    "cispo, KL with the ratio": (
        {"loss_type": "cispo", "epsilon_high": 1.5, "beta": 0.04, "use_bias_correction_kl": True},
        row("cispo", clip_high=0.5, kl=0.04),
        {"correction": True},
        "high",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient(case, saved, trainer):
    settings, algorithm, further, binds = CASES[case]
    further = dict(further)
    model = load(saved)
    material = Material(model, distance=further.pop("distance", 0.3))
    built = trainer(**settings)
    found = ours(model, material, algorithm, **further)
    agree(found, theirs(built, material.padded()))

    sides = {"low": [clip for _, clip in found.low], "high": [clip for _, clip in found.high]}
    dual = [clip and material.advantages[owner] < 0 for owner, clip in found.high]
    for side in binds.split():
        assert any(dual if side == "dual" else sides[side]), f"no token is clipped: {side}"
    assert not all(low or high for low, high in zip(sides["low"], sides["high"], strict=True))
    if settings["loss_type"] != "cispo" and "dual" not in further:
        # TRL counts tokens, or answers where the ratio is the answer's; it has no metric of the dual clip.
        per_answer = algorithm.ratio != "token"
        for side, pairs in {"low": found.low, "high": found.high}.items():
            counted = list(dict(pairs).values()) if per_answer else sides[side]
            assert built._metrics["train"][f"clip_ratio/{side}_mean"] == [pytest.approx(sum(counted) / len(counted))]


def test_truncated_importance(saved, trainer):
    model = load(saved)
    material = Material(model)
    built = trainer(loss_type="dapo", epsilon=0.2, epsilon_high=0.28, beta=0.04, use_bias_correction_kl=False)
    built.use_vllm = True  # as attribute: the setting would look for vLLM
    ratio = [(old - sampler).exp().clamp(max=1.2) for old, sampler in zip(material.old, material.sampler, strict=True)]
    assert (torch.cat(ratio) == 1.2).any()
    assert (torch.cat(ratio) < 1.2).any()
    inputs = material.padded() | {"importance_sampling_ratio": torch.nn.utils.rnn.pad_sequence(ratio, batch_first=True)}
    agree(ours(model, material, row("dapo", kl=0.04), cap=1.2), theirs(built, inputs))


def test_rloo_takes_the_answer_as_one_action(saved, trainer):
    model = load(saved)
    material = Material(model, distance=0.2)
    found = ours(model, material, row("rloo", ratio="product"))
    built = trainer("RLOO", epsilon=0.2, beta=0.0)
    agree(found, theirs(built, material.padded()))
    for side in (found.low, found.high):
        assert 0 < sum(dict(side).values()) < ANSWERS


ON_POLICY = {
    "grpo": ("GRPO", {"loss_type": "grpo"}, row("grpo", kl=0.0), {}),
    "dr_grpo": ("GRPO", {"loss_type": "dr_grpo"}, row("dr_grpo"), {}),
    "dapo": ("GRPO", {"loss_type": "dapo"}, row("dapo"), {}),
    "gspo": ("GRPO", {"loss_type": "grpo", "importance_sampling_level": "sequence"}, row("gspo"), {}),
    "cispo": ("GRPO", {"loss_type": "cispo", "epsilon_high": 5.0}, row("cispo"), {}),
    "rloo": ("RLOO", {"beta": 0.0}, row("rloo", ratio="product"), {}),
    # On-policy the answer as one action is a sum over its tokens. Our row's own `sample_mean` of token ratios divides it by the
    # answer's length besides, which this does not.
    "rloo, by tokens": ("RLOO", {"beta": 0.0}, row("rloo", aggregation="constant"), {"longest": 1}),
}


@pytest.mark.parametrize("case", ON_POLICY)
def test_gradient_on_policy(case, saved, trainer):
    kind, settings, algorithm, further = ON_POLICY[case]
    model = load(saved)
    material = Material(model)
    material.old = material.now
    inputs = material.padded()
    if kind == "GRPO":
        del inputs["old_per_token_logps"]  # so TRL takes its own, detached, as we do
        material.old = None
    found, expected = ours(model, material, algorithm, **further), theirs(trainer(kind, **settings), inputs)
    if further:
        expected.loss = found.loss  # each token's ratio is 1, and there are more tokens than answers
    agree(found, expected)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo"])
def test_the_same_update_however_it_is_accumulated(loss_type, saved, trainer):
    model = load(saved)
    material = Material(model)
    built = trainer(
        loss_type=loss_type,
        epsilon=0.2,
        epsilon_high=1.5 if loss_type == "cispo" else 0.28,
        per_device_train_batch_size=SAMPLES,
        gradient_accumulation_steps=GROUPS,
    )
    algorithm = row(loss_type, kl=0.0, clip_high=0.5 if loss_type == "cispo" else 0.28)
    parts = [material.padded(slice(start, start + SAMPLES)) for start in range(0, ANSWERS, SAMPLES)]
    agree(ours(model, material, algorithm), theirs(built, *parts))


# Where TRL defines it otherwise: that the numbers differ, and the exact relation.


def test_token_mean_of_several_updates_a_rollout(saved, trainer):
    # TRL divides by the rollout's tokens / its updates, we by those of the update's own minibatch.
    model = load(saved)
    material = Material(model)
    built = trainer(loss_type="dapo", epsilon=0.2, epsilon_high=0.28, steps_per_generation=2)
    inputs = material.padded()
    inputs["num_items_in_batch"] += 50  # those of the other update
    expected = theirs(built, inputs)
    tokens = sum(material.lengths)
    scale = tokens / ((tokens + 50) / 2)
    assert abs(scale - 1) > 0.05
    agree(scaled(ours(model, material, row("dapo")), scale), expected)


def test_kl_with_the_ratio_of_a_sequence(saved, trainer):
    # TRL multiplies the KL of a token by the ratio it has, here the sequence's; π/π_old of the token is what corrects its KL.
    model = load(saved)
    material = Material(model)
    expected = theirs(
        trainer(
            loss_type="grpo",
            importance_sampling_level="sequence",
            epsilon=3e-4,
            epsilon_high=4e-4,
            beta=0.04,
            use_bias_correction_kl=True,
        ),
        material.padded(),
    )
    assert errors(ours(model, material, row("gspo", kl=0.04), correction=True), expected)[1] > 1e-3
    agree(ours(model, material, row("gspo", kl=0.04), kl_ratio="sequence"), expected)


def test_a_dual_clip_below_the_upper_clip(saved, trainer):
    # TRL's bound holds before the minimum is taken, for answers better than their group too: where it lies below the upper clip
    # (R1's ε 10 with c 3), the two change places.
    model = load(saved)
    material = Material(model, distance=2.0)
    expected = theirs(trainer(loss_type="grpo", epsilon=10.0, delta=3.0), material.padded())
    r1 = row("grpo", clip_low=10.0, clip_high=10.0, kl=0.0)
    assert errors(ours(model, material, r1, dual=3.0), expected)[1] > 1e-3
    agree(ours(model, material, replace(r1, clip_high=2.0), dual=11.0), expected)


def test_a_pad_id_that_is_a_token(saved, trainer):
    # In TRL the model keeps its `padding_idx`: the embedding of a pad id that stands in a text learns nothing there.
    model = load(saved)
    material = Material(model, lowest=PAD)
    assert any(PAD in text.prompt + text.completion[:-1] for text in material.texts)
    found = ours(model, material, row("grpo", kl=0.0))
    expected = theirs(trainer(loss_type="grpo", epsilon=0.2), material.padded())
    name = "model.embed_tokens.weight"
    assert not expected.gradient[name][PAD].any()
    assert found.gradient[name][PAD].any()
    found.gradient[name][PAD] = 0
    agree(found, expected)
