"""The same gradient and the same updates under ZeRO 0 to 3, on one process and two, packed or one at a time, however cut.

In bfloat16 as well, whose gradients are summed in float32.
"""

import json
import random

import pytest
import torch

from stages.problems.episode import Episode, Group, Problem, Reward
from stages.rollout.records import write_groups
from tests.conftest import tiny_llama
from tests.stage_process import on_forked_ranks, on_ranks

KL = 0.05


def packed(micro):
    return {"packing": {"micro_tokens": micro}}


# Minibatches of one answer leave the second rank without any.
UPDATES = {
    **{f"zero{zero}": {"deepspeed": f"zero{zero}", "kl": KL, **packed(20)} for zero in range(4)},
    "zero2-one": {"deepspeed": "zero2", "kl": KL, **packed(1000)},
    **{f"zero{z}-minibatches": {"deepspeed": f"zero{z}", "kl": KL, "minibatches": 3, **packed(20)} for z in (0, 2, 3)},
    **{f"zero{z}-idle": {"deepspeed": f"zero{z}", "kl": KL, "groups": 1, "minibatches": 4, **packed(1000)} for z in (2, 3)},
    **{
        f"zero{zero}-ppo-{model}": {
            "deepspeed": f"zero{zero}",
            "algorithm": "ppo",
            "critic": {"model": model, "lr": 1e-3},
            "kl": KL,
            "minibatches": 2,
            "epochs": 2,
            **packed(20),
        }
        for zero, model in ((2, "own"), (3, "own"), (2, "shared"), (3, "shared"))
    },
    # One text per row, after a check of the engine in which all ranks take part.
    **{f"zero{zero}-rows": {"deepspeed": f"zero{zero}", "kl": KL, "path": "rows", **packed(20)} for zero in range(4)},
    "zero3-rows-ppo-own": {
        "deepspeed": "zero3",
        "algorithm": "ppo",
        "critic": {"model": "own", "lr": 1e-3},
        "kl": KL,
        "minibatches": 2,
        "epochs": 2,
        "path": "rows",
        **packed(20),
    },
}
HALF = {f"bfloat16-zero{zero}": {"deepspeed": f"zero{zero}", "kl": KL, "dtype": "bfloat16", **packed(20)} for zero in range(4)}
COPIES = 16
"""Micro-batches of the same text: a sum in bfloat16 is rounded from the third on, by thousandths. (A power of two: the shares
lose nothing.)"""
REPEATED = {
    f"repeated-zero{zero}": {"deepspeed": f"zero{zero}", "dtype": "bfloat16", "copies": [1, COPIES]} for zero in range(4)
}
LONGER = ["zero2-one", "zero0-minibatches", "zero3-minibatches", "zero2-idle", "zero3-ppo-own", "zero2-ppo-shared"]
LONGER += ["zero0-rows", "zero1-rows", "zero2-rows", "zero3-rows-ppo-own"]
# What the cases are compared with: one process, without ZeRO, one answer at a time.
PLAIN = {
    name: {**UPDATES[case], "deepspeed": "zero0", **packed(1)}
    for name, case in {
        "plain": "zero0",
        "minibatches": "zero0-minibatches",
        "idle": "zero2-idle",
        "ppo-own": "zero2-ppo-own",
        "ppo-shared": "zero2-ppo-shared",
    }.items()
}
WIDTH = 12
"""Tokens that are computed of a text of the gradient test: prompts differ, and answers fill up."""


def recorded_groups(rng, length):
    """Five groups of four answers; `length`: tokens of an answer, from those of its prompt."""
    groups = []
    for number in range(5):
        problem = Problem(id=f"p{number}", question="q", answer="a", source="s")
        group = Group(problem)
        prompt = [rng.randrange(2, 32) for _ in range(rng.randrange(2, 6))]
        for sample in range(4):
            completion = [rng.randrange(2, 32) for _ in range(length(len(prompt)))]
            group.episodes.append(
                Episode(
                    problem=problem,
                    sample=sample,
                    prompt="",
                    prompt_ids=prompt,
                    completion_ids=completion,
                    logprobs=[-1.0] * len(completion),
                    text="",
                    finish="stop",
                    reward=Reward(total=rng.random(), parts={}, verdict="right"),
                )
            )
        groups.append(group)
    return groups


_random = random.Random(0)
RECORDED = {
    "unequal": recorded_groups(_random, lambda _: _random.randrange(1, 9)),
    "equal": recorded_groups(_random, lambda prompt: WIDTH + 1 - prompt),
}
ANSWERS = 20
_tokens = sum(
    len(group.episodes[0].prompt_ids) + sum(len(e.completion_ids) - 1 for e in group.episodes) for group in RECORDED["equal"]
)
# So many answers at a time, side by side behind their prompts.
CUTS = {"1": packed(1)} | {str(answers): packed(-(-_tokens * answers // ANSWERS)) for answers in (8, ANSWERS)}
GRADIENTS = {
    f"gradient-zero{zero}": {"deepspeed": f"zero{zero}", "kl": KL, "cuts": [cut["packing"] for cut in CUTS.values()]}
    for zero in range(4)
}
GRADIENTS["gradient-bfloat16"] = {**GRADIENTS["gradient-zero0"], "dtype": "bfloat16"}


# A checkpoint of two updates, written by one process without ZeRO, or by two under a stage, goes on under another layout.
RESUMED = {
    1: {
        "one-from-two-zero3": {"deepspeed": "zero0", "kl": KL, "resume": "saved/zero3", **packed(20)},
        "one-from-two-zero2-ppo": {**UPDATES["zero2-ppo-own"], "deepspeed": "zero1", "resume": "saved/zero2-ppo-own"},
        "one-zero3-from-two-zero0": {"deepspeed": "zero3", "kl": KL, "resume": "saved/zero0", **packed(20)},
    },
    2: {
        "two-from-one-zero0": {"deepspeed": "zero3", "kl": KL, "resume": "saved/plain", **packed(20)},
        "two-zero2-from-one-zero0": {"deepspeed": "zero2", "kl": KL, "resume": "saved/plain", **packed(20)},
        "two-zero3-from-one-ppo": {**UPDATES["zero3-ppo-own"], "resume": "saved/ppo-own"},
        # The same layout again: the same bits.
        **{f"again-{name}": {**UPDATES[name], "resume": f"here/{name}"} for name in ("zero0", "zero1", "zero2", "zero3")},
        **{f"again-{name}": {**case, "resume": f"here/{name}"} for name, case in HALF.items()},
        **{
            f"again-{mine}-from-{saved}": {**HALF[mine], "resume": f"here/{saved}"}
            for mine, saved in (("bfloat16-zero3", "bfloat16-zero0"), ("bfloat16-zero0", "bfloat16-zero2"))
        },
    },
}


def run(folder, processes, cases):
    (folder / "cases.json").write_text(json.dumps(cases))
    (on_ranks if torch.cuda.is_available() else on_forked_ranks)("tests.rl.zero_updates", folder, processes)
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in cases}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """World size -> case -> what it left."""
    found = {}
    for world, updates in ((1, PLAIN), (2, UPDATES | HALF | REPEATED)):
        folder = tmp_path_factory.mktemp("world")
        for name, groups in RECORDED.items():
            write_groups(folder / name, groups)
        cases = {name: case | {"recorded": "unequal"} for name, case in updates.items() if name not in LONGER}
        found[world] = run(folder, world, cases | {name: case | {"recorded": "equal"} for name, case in GRADIENTS.items()})
        found[world]["folder"] = folder
    return found


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """The cases that only the slow run takes, on two processes."""
    folder = tmp_path_factory.mktemp("longer")
    write_groups(folder / "unequal", RECORDED["unequal"])
    return run(folder, 2, {name: UPDATES[name] | {"recorded": "unequal"} for name in LONGER})


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, results):
    """World size -> case -> what one further update left, from a checkpoint of the other world size."""
    found = {}
    for world, cases in RESUMED.items():
        folder = tmp_path_factory.mktemp("resumed")
        write_groups(folder / "unequal", RECORDED["unequal"])
        (folder / "saved").symlink_to(results[3 - world]["folder"] / "saved")
        (folder / "here").symlink_to(results[world]["folder"] / "saved")
        found[world] = run(folder, world, {name: case | {"recorded": "unequal"} for name, case in cases.items()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("world", "case"), [(world, case) for world, cases in RESUMED.items() for case in cases])
def test_a_checkpoint_goes_on_under_any_layout(results, resumed, world, case):
    saved = RESUMED[world][case]["resume"].split("/")[1]
    uninterrupted = results[world if case.startswith("again") else 3 - world][saved]
    found = resumed[world][case]
    if case.startswith("again") and "-from-" not in case:
        assert torch.equal(found["weights"], uninterrupted["weights"])
        return
    start = torch.cat([p.detach().flatten() for p in tiny_llama().float().parameters()])
    mine, theirs = found["weights"].float(), uninterrupted["weights"].float()
    assert torch.linalg.norm(mine - theirs) / torch.linalg.norm(theirs[: len(start)] - start) <= 1e-3


@pytest.mark.parametrize("case", [name for name in UPDATES if name not in LONGER])
def test_every_zero_stage_makes_the_same_updates(results, case):
    same_updates(results[2][case], results, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", LONGER)
def test_further_cases_make_the_same_updates(results, longer, case):
    same_updates(longer[case], results, case)


def same_updates(found, results, case):
    start = torch.cat([p.detach().flatten() for p in tiny_llama().float().parameters()])
    _, _, kind = case.partition("-")
    kind = kind.removeprefix("rows").removeprefix("-")
    reference = results[1]["plain" if kind in ("", "one") else kind]
    moved = torch.linalg.norm(reference["weights"][: len(start)] - start)
    assert moved > 0.01
    assert torch.linalg.norm(found["weights"] - reference["weights"]) / moved <= 1e-3
    for mine, theirs in zip(found["stats"], reference["stats"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-6)
        assert mine["value_loss"] == pytest.approx(theirs["value_loss"], rel=1e-3)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert mine["tokens"] == theirs["tokens"]
    if "ppo" in case:
        assert all(s["valued"] == s["tokens"] and s["value_loss"] > 0 for s in found["stats"])


@pytest.mark.parametrize("case", HALF)
def test_every_zero_stage_makes_the_same_updates_in_bfloat16(results, case):
    """To a part in ten thousand of the way: only rounding of float32 sums may part them, not sums in bfloat16 (0.0015)."""
    start = torch.cat([p.detach().flatten() for p in tiny_llama().float().parameters()])
    found, other, exact = (results[2][name]["weights"].float() for name in (case, "bfloat16-zero0", "zero0"))
    moved = torch.linalg.norm(exact - start)
    assert torch.linalg.norm(found - other) / moved <= 1e-4
    assert torch.linalg.norm(found - exact) / moved <= 0.25  # AdamW's steps are about as large for a small gradient


@pytest.mark.parametrize("case", REPEATED)
def test_gradients_of_bfloat16_weights_are_summed_in_float32(results, case):
    once, often = results[2][case]["gradients"]
    assert torch.linalg.norm(often - once) / torch.linalg.norm(once) <= 1e-5


def test_minibatches_after_the_first_are_off_policy(results):
    clipped = [s["clipped_low"] + s["clipped_high"] for s in results[2]["zero2-minibatches"]["stats"]]
    assert clipped[0] == 0
    assert max(clipped) > 0


def plain_gradient(groups):
    """GRPO as its equation has it, in float64, one answer at a time through the plain model."""
    model, frozen, total = tiny_llama(), tiny_llama(seed=1), 0.0
    for group in groups:
        rewards = torch.tensor([e.reward.total for e in group.episodes], dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        for episode, advantage in zip(group.episodes, advantages, strict=True):
            ids, length = torch.tensor([episode.prompt_ids + episode.completion_ids]), len(episode.completion_ids)

            def logp(of, ids=ids, length=length):
                said = of(ids).logits.log_softmax(-1)[0, -length - 1 : -1]
                return said[torch.arange(length), ids[0, -length:]]

            mine, d = logp(model), logp(frozen).detach() - logp(model)
            objective = torch.exp(mine - mine.detach()) * advantage - KL * (torch.exp(d) - d - 1)
            total = total - objective.mean() / (len(groups) * len(group.episodes))
    total.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_the_gradient_is_the_equations_for_every_cut_world_size_and_zero_stage(results):
    expected = plain_gradient(RECORDED["equal"])
    errors = {
        (world, zero, cut): float(torch.linalg.norm(gradient.double() - expected) / torch.linalg.norm(expected))
        for world in results
        for zero in GRADIENTS
        if zero != "gradient-bfloat16"
        for cut, gradient in zip(CUTS, results[world][zero]["gradients"], strict=True)
    }
    assert len(errors) == 2 * 4 * len(CUTS)
    assert max(errors.values()) <= 1e-5, errors
    rounded = results[2]["gradient-bfloat16"]["gradients"]
    assert all(torch.linalg.norm(x.double() - expected) / torch.linalg.norm(expected) <= 0.02 for x in rounded)
    passes = dict(zip(CUTS, results[1]["gradient-zero0"]["passes"], strict=True))
    assert passes["1"] == [1] * 20
    for answers in (8, ANSWERS):  # the cuts are what their names say, within an answer
        assert sum(passes[str(answers)]) == ANSWERS
        assert len(passes[str(answers)]) == -(-ANSWERS // answers)
        assert max(passes[str(answers)]) <= answers + 1
