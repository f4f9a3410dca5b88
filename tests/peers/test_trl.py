"""The same tensors through TRL's own trainers and through ours: the same losses, gradients and advantages.

TRL's `_compute_loss` and `_generate_and_score_completions` are called as they are; only the drawing of answers is replaced.
Where the two define a thing differently, the exact relation between the definitions is asserted instead.
TRL is imported when a test runs, not when this file is read: who does not run `make peers` does not have it.
"""

import random
from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from stages.engine.packed import Text, micro_batches
from stages.engine.scorer import TokenScorer
from stages.grpo.advantages import EPSILON, batch_whitened, group, group_centred, leave_one_out
from stages.grpo.algorithms import ALGORITHMS, PRESETS
from stages.grpo.kl import ESTIMATORS, kl_terms
from stages.grpo.losses import policy_ratio, policy_terms, token_weights, truncated_importance
from tests.conftest import tiny_llama

pytestmark = pytest.mark.peers

RELATIVE = 1e-5
GROUPS, SAMPLES, LONGEST = 3, 4, 12
ANSWERS = GROUPS * SAMPLES
PAD, END = 0, 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The model and its tokenizer on disk, for TRL reads its reference from there. A token's text is its number."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    tiny_llama().float().save_pretrained(path)
    words = {"<pad>": PAD, "<eos>": END} | {str(number): number for number in range(2, 32)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(path)
    return path


def load(path):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.fixture
def trainer(saved, tmp_path):
    """A function that builds one of TRL's trainers around a fresh copy of the model."""

    def build(kind="GRPO", rewards=None, **settings):
        import trl
        from datasets import Dataset
        from transformers import AutoTokenizer

        sizes = {"per_device_train_batch_size": ANSWERS, "num_generations": SAMPLES, "max_completion_length": LONGEST}
        plain = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
        config = getattr(trl, f"{kind}Config")(str(tmp_path), **(sizes | plain | settings))
        built = getattr(trl, f"{kind}Trainer")(
            model=load(saved),
            reward_funcs=lambda completions, **_: rewards,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["2"]}),
            processing_class=AutoTokenizer.from_pretrained(saved),
        )
        built.model.train()  # no dropout in it
        built.current_gradient_accumulation_steps = config.gradient_accumulation_steps  # its training loop sets this
        return built

    return build


class Material:
    """Groups of answers of unequal lengths to prompts of unequal lengths, sampled by a policy at some distance from ours."""

    def __init__(self, model, *, distance=0.3, lowest=2, cut=()):
        rng, noise = random.Random(1), torch.Generator().manual_seed(1)
        self.texts = []
        for length in (3, 7, 5):
            prompt = [rng.randrange(lowest, 32) for _ in range(length)]
            for _ in range(SAMPLES):
                self.texts.append(Text(prompt, [rng.randrange(lowest, 32) for _ in range(rng.randrange(1, LONGEST))]))
        for number, text in enumerate(self.texts):
            if number not in cut:
                text.completion.append(END)
        self.lengths = [len(text.completion) for text in self.texts]
        # Not of mean 0 as a group's are: else the loss is a small difference of large numbers, and float32 has no more digits.
        self.advantages = torch.randn(ANSWERS, generator=noise).abs() * torch.tensor([1.0, -0.5] * (ANSWERS // 2))
        self.now = [logp.detach() for logp in score(model, self.texts, 1.0)]

        def near(values, by):
            return [value + by * torch.randn(len(value), generator=noise) for value in values]

        self.old = near(self.now, distance)
        self.reference = near(self.now, 0.5)
        self.sampler = near(self.old, 0.5)

    def only(self, kept):
        """These answers alone."""
        found = copy(self)
        found.texts, found.lengths, found.old = ([getattr(self, n)[i] for i in kept] for n in ("texts", "lengths", "old"))
        found.advantages = self.advantages[kept]
        return found

    def padded(self, chosen=slice(None)):
        """What TRL's `_compute_loss` reads, for some of the answers."""
        texts = self.texts[chosen]

        def filled(values, side="right"):
            return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=0, padding_side=side)

        prompts, completions = ([torch.tensor(getattr(t, name)) for t in texts] for name in ("prompt", "completion"))
        return {
            "prompt_ids": filled(prompts, "left"),
            "prompt_mask": filled([torch.ones_like(p) for p in prompts], "left"),
            "completion_ids": filled(completions),
            "completion_mask": filled([torch.ones_like(c) for c in completions]),
            "advantages": self.advantages[chosen],
            "num_items_in_batch": torch.tensor(sum(self.lengths)),
            "old_per_token_logps": filled(self.old[chosen]),
            "ref_per_token_logps": filled(self.reference[chosen]),
            "old_logps": torch.stack([old.sum() for old in self.old[chosen]]),
        }


def score(model, texts, temperature):
    """(answers,) log-probabilities of each answer, packed in several micro-batches."""
    found = {}
    for rows in micro_batches(texts, 60):
        logp = TokenScorer(model)(rows, temperature)[0]
        found |= {int(o): logp[rows.owner == o] for o in rows.owner.unique()}
    return [found[owner] for owner in range(len(texts))]


def ours(model, material, row, *, temperature=1.0, correction=False, cap=None, dual=None, longest=LONGEST, kl_ratio=None):
    """Our loss Σ w (c·policy + β kl) with its gradient, micro-batch by micro-batch; `row` is one of the table of algorithms."""
    weights = torch.tensor(token_weights(material.lengths, row.aggregation, longest))
    scorer = TokenScorer(model)
    found = SimpleNamespace(loss=0.0, low=[], high=[])
    micro = micro_batches(material.texts, 60)
    assert len(micro) > 1, "more than one micro-batch"
    model.zero_grad()
    for rows in micro:
        logp, _ = scorer(rows, temperature)

        def flat(values, rows=rows):
            return torch.cat([values[owner] for owner in rows.owner.unique_consecutive()])

        old = logp.detach() if material.old is None else flat(material.old)
        terms = policy_terms(
            logp,
            old,
            material.advantages[rows.owner],
            rows.owner,
            ratio=row.ratio,
            surrogate=row.surrogate,
            clip_low=row.clip_low,
            clip_high=row.clip_high,
            clip_dual=dual,
        )
        each = terms.policy
        if cap is not None:
            each = each * truncated_importance(old, flat(material.sampler), cap)
        if row.kl and row.kl_place == "loss":
            kl = kl_terms(logp, flat(material.reference), row.kl_estimator, old_logp=old, correction=correction)
            if kl_ratio is not None:
                kl = kl * policy_ratio(logp, old, rows.owner, kl_ratio)
            each = each + row.kl * kl
        loss = (weights[rows.owner] * each).sum()
        loss.backward()
        found.loss += loss.item()
        found.low += [(int(o), bool(c)) for o, c in zip(rows.owner, terms.clipped_low, strict=True)]
        found.high += [(int(o), bool(c)) for o, c in zip(rows.owner, terms.clipped_high, strict=True)]
    found.gradient = gradient(model)
    return found


def gradient(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def theirs(built, *batches):
    """TRL's loss and gradient, summed over micro-batches."""
    built.model.zero_grad()
    total = 0.0
    for inputs in batches:
        loss = built._compute_loss(built.model, inputs)
        loss.backward()
        total += loss.item()
    return SimpleNamespace(loss=total, gradient=gradient(built.model))


def errors(found, expected):
    """Relative errors of the loss and of the whole gradient."""
    assert found.gradient.keys() == expected.gradient.keys()
    mine, peer = (torch.cat([g.flatten().double() for g in side.gradient.values()]) for side in (found, expected))
    loss = abs(found.loss - expected.loss) / max(abs(expected.loss), 1e-30)
    return loss, float((mine - peer).norm() / peer.norm())


def agree(found, expected):
    loss, whole = errors(found, expected)
    print(f"relative error of the loss {loss:.1e}, of the gradient {whole:.1e}")
    assert loss <= RELATIVE
    assert whole <= RELATIVE
    for name, gradient in expected.gradient.items():
        assert (found.gradient[name] - gradient).norm() <= RELATIVE * gradient.norm(), name


def scaled(found, by):
    return SimpleNamespace(loss=found.loss * by, gradient={name: value * by for name, value in found.gradient.items()})


def row(name, **changes):
    return replace(ALGORITHMS[name], **changes)


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


# Advantages, from TRL's whole way from prompts to a scored batch.


def generated(built, texts, logprobs=None):
    """TRL's own scoring of given answers."""
    completions = [list(text.completion) for text in texts]

    def drawn(*_, **__):
        return (completions, logprobs) if type(built).__name__ == "GRPOTrainer" else completions

    built._generate_single_turn = drawn
    return built._generate_and_score_completions([{"prompt": " ".join(map(str, text.prompt))} for text in texts])


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
