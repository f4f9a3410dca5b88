"""The same tensors for TRL and for us, what either makes of them, and how far apart that is."""

import random
from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import torch

from stages.engine.packing.pack import Text, micro_batches
from stages.engine.scorer import TokenScorer
from stages.rl.algorithms import ALGORITHMS
from stages.rl.kl import kl_terms
from stages.rl.losses import policy_ratio, policy_terms, token_weights, truncated_importance

RELATIVE = 1e-5
GROUPS, SAMPLES, LONGEST = 3, 4, 12
ANSWERS = GROUPS * SAMPLES
PAD, END = 0, 1


def load(path):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)


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


def generated(built, texts, logprobs=None):
    """TRL's own scoring of given answers."""
    completions = [list(text.completion) for text in texts]

    def drawn(*_, **__):
        return (completions, logprobs) if type(built).__name__ == "GRPOTrainer" else completions

    built._generate_single_turn = drawn
    return built._generate_and_score_completions([{"prompt": " ".join(map(str, text.prompt))} for text in texts])
