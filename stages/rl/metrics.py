"""The metrics of an RL stage: their names, and how they are read off groups.

The same names are in the journal, in MLflow, in the progress bar and in reports.
"""

from collections.abc import Sequence
from statistics import fmean, pstdev

import torch

from stages.problems.episode import PARTS, Episode, Group
from stages.rewards.reflection import reflective_words
from stages.rewards.tags import several_answers
from stages.rl.advantages import zero_variance

NAMES = {
    "train/loss": "policy loss plus weighted KL (and a shared value model's loss); as all train/, mean over a step's updates",
    "train/lr": "learning rate of the step",
    "train/grad_norm": "global norm of the gradient before clipping",
    "train/kl": "k3 against the reference, mean over trained tokens (only with a reference)",
    "train/entropy": "entropy of the policy in nats, mean over trained tokens",
    "train/clip_fraction_low": "share of trained tokens whose gradient the lower clip took away (cispo: bounded)",
    "train/clip_fraction_high": "share of trained tokens whose gradient the upper or dual clip took away (cispo: bounded)",
    "train/ratio_max": "largest ratio of policy and sampling policy on a token; 1 when on-policy",
    "train/importance": "truncated importance weight, mean over trained tokens; 1: sampler and trainer agree (with a cap)",
    "train/mismatch_kl": "k3 between sampler and trainer on the sampled tokens; healthy below 1e-3",
    "train/mismatch_max": "largest difference of sampler's and trainer's log-probability on a token",
    "train/updates": "optimizer steps of the policy in the step",
    "value/loss": "value loss, mean over tokens (PPO)",
    "value/clip_fraction": "share of tokens whose gradient the clip of the value loss took away (PPO)",
    "value/grad_norm": "global norm of an own value model's gradient before clipping (PPO)",
    "value/explained_variance": "1 - Var(returns - values) / Var(returns) before the updates: 1 perfect, 0 a constant (PPO)",
    "value/explained_variance_first": "the same over the first third of each answer's tokens (PPO)",
    "value/explained_variance_middle": "over the middle third (PPO)",
    "value/explained_variance_last": "over the last third (PPO)",
    "value/mean": "value before the updates, mean over tokens (PPO)",
    "value/return": "return, mean over tokens (PPO)",
    "reward/total": "weighted reward, mean over answers",
    "reward/std": "its standard deviation over answers",
    "reward/accuracy": "share of right answers among those judged, without verdict counted as not right",
    "reward/format": "share of answers in the strict format",
    "reward/language": "share of the thinking in the target language, mean over answers that think",
    "reward/overlong": "soft punishment of answers near the limit, -1 to 0, mean (only with `rewards.overlong`)",
    "reward/repetition": "penalty for repeated word sequences, -1 to 0, mean (only with `rewards.repetition`)",
    "reward/preference": "what the reward model says, mean (only with `rewards.preference`)",
    "reward/random": "fair coin of the control arm, mean (only with `rewards.random`)",
    "reward/accuracy_std": "standard deviation over answers, as for the following",
    "reward/format_std": "of the format",
    "reward/language_std": "of the language",
    "reward/overlong_std": "of the overlong punishment",
    "reward/repetition_std": "of the repetition penalty",
    "reward/preference_std": "of the preference",
    "reward/random_std": "of the coin",
    "reward/kl_penalty": "what an answer pays for its KL, mean over those trained on (only with a KL in the reward)",
    "rollout/sampled_tokens": "tokens sampled since the stage began (what `most_tokens` counts)",
    "rollout/length": "tokens of an answer, mean",
    "rollout/length_right": "tokens of a right answer, mean",
    "rollout/length_wrong": "tokens of a wrong answer, mean",
    "rollout/truncated": "share of answers cut at the limit",
    "rollout/no_verdict": "share of answers without verdict; unjudged ones count where rewards of yours failed on some",
    "rollout/several_answers": "share of answers that state several final answers",
    "rollout/zero_variance": "share of groups whose rewards are all equal: they carry no signal",
    "rollout/zero_signal_groups": "how many groups these are",
    "rollout/pass_at_k": "share of judged problems with at least one right answer among their k = `samples`",
    "rollout/reflective_words": "words such as wait, check, however in an answer, mean",
    "rollout/groups": "groups trained on (only with dynamic sampling)",
    "rollout/resamples": "further draws of dynamic sampling",
    "eval/reward": "weighted reward on held-out problems",
    "eval/accuracy": "share of right answers on judged held-out problems",
    "eval/format": "share in the strict format on held-out problems",
    "eval/language": "share of the thinking in the target language on held-out problems",
    "eval/overlong": "soft punishment of answers near the limit on held-out problems",
    "eval/repetition": "penalty for repeated word sequences on held-out problems",
    "eval/preference": "what the reward model says on held-out problems",
    "eval/random": "fair coin of the control arm on held-out problems",
    "eval/length": "tokens of an answer on held-out problems, mean",
    "eval/pass_at_k": "share of judged held-out problems with at least one right answer (with more than one sample)",
    "health/canaries_missed": "answers with known verdicts that the verifier misjudged (each `health.canary_every` steps)",
    "health/canary": "1 in a step with this alarm, as the following",
    "health/no_verdict": "too many answers without verdict",
    "health/several_answers": "too many answers that state several final answers",
    "health/no_signal": "no step had a group whose rewards differ",
    "health/format_gain": "format rose while accuracy was flat",
    "health/length_factor": "the length drifted while accuracy was flat",
    "time/step": "seconds from one line of the journal to the next: the step and what came after the one before it",
    "time/sample": "seconds of sampling",
    "time/score": "seconds of judging answers after the last was sampled (the others are judged while sampling goes on)",
    "time/prepare": "seconds of drawing problems, advantages, packing, metrics: all of the step that has no name of its own",
    "time/forward": "seconds of forward passes and losses (policy, reference, value model)",
    "time/backward": "seconds of backward passes",
    "time/optimizer": "seconds of clipping and optimizer steps",
    "time/weights": "seconds of handing weights to the sampler or the reference",
    "time/wait": "seconds of waiting for other processes",
    "time/checkpoint": "seconds that checkpoints hold training up (they are written beside it)",
    "time/tracking": "seconds of writing the rollouts and the journal",
    "time/eval": "seconds of held-out evaluation",
    "time/tokens_per_second": "sampled tokens per second of the step without its evaluation",
}
"""Name -> what it is. A metric that cannot be measured in a step is left out of it."""


def reward_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Mean and spread of the reward and of its parts."""
    found = {
        "reward/total": fmean(e.scored.total for e in episodes),
        "reward/std": pstdev([e.scored.total for e in episodes]),
    }
    own = {part: None for e in episodes for part in e.scored.parts if part not in PARTS}
    for part in (*PARTS, *own):
        values = [e.scored.parts[part] for e in episodes if part in e.scored.parts]
        if values:
            found[f"reward/{part}"] = fmean(values)
            found[f"reward/{part}_std"] = pstdev(values)
    return found


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Lengths, truncation, verdicts, groups without signal, pass@k, reflective words.

    What is about right and wrong is of the judged problems, and left out where there are none.
    """
    episodes = [episode for group in groups for episode in group.episodes]
    judged = [episode for episode in episodes if episode.problem.judged]
    # An unjudged answer has a verdict `none` where a function of the user's said nothing: then its kind counts too.
    counted = episodes if any(e.scored.verdict == "none" and not e.problem.judged for e in episodes) else judged
    found = {
        "rollout/length": fmean(len(e.completion_ids) for e in episodes),
        "rollout/truncated": fmean(float(e.truncated) for e in episodes),
        "rollout/several_answers": fmean(float(several_answers(e.text)) for e in episodes),
        "rollout/reflective_words": fmean(reflective_words(e.text) for e in episodes),
    }
    if counted:
        found["rollout/no_verdict"] = fmean(float(e.scored.verdict == "none") for e in counted)
    if judged:
        found["rollout/pass_at_k"] = pass_at_k(groups)
    if len(groups[0].episodes) > 1:
        equal = zero_variance(*rewards_of(groups)).double()
        found |= {"rollout/zero_variance": float(equal.mean()), "rollout/zero_signal_groups": float(equal.sum())}
    for verdict in ("right", "wrong"):
        lengths = [len(e.completion_ids) for e in episodes if e.scored.verdict == verdict]
        if lengths:
            found[f"rollout/length_{verdict}"] = fmean(lengths)
    return found


def held_out_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """The metrics of an evaluation during training, under `eval/`."""
    episodes = [episode for group in groups for episode in group.episodes]
    means = {name: value for name, value in reward_metrics(episodes).items() if not name.endswith("std")}
    found = {f"eval/{name.removeprefix('reward/')}": value for name, value in means.items()}
    found["eval/reward"] = found.pop("eval/total")
    found["eval/length"] = fmean(len(e.completion_ids) for e in episodes)
    if len(groups[0].episodes) > 1 and any(group.problem.judged for group in groups):
        found["eval/pass_at_k"] = pass_at_k(groups)
    return found


def pass_at_k(groups: Sequence[Group]) -> float:
    """Share of the judged problems' groups, of which there must be one, with at least one right answer."""
    judged = [group for group in groups if group.problem.judged]
    return fmean(float(any(e.scored.verdict == "right" for e in group.episodes)) for group in judged)


def rewards_of(groups: Sequence[Group]) -> tuple[torch.Tensor, torch.Tensor]:
    """(groups, G) rewards in float64, and (groups, G) whether each is known: not where the verdict is `none`."""
    totals = torch.tensor([[e.scored.total for e in group.episodes] for group in groups], dtype=torch.float64)
    return totals, torch.tensor([[e.scored.verdict != "none" for e in group.episodes] for group in groups])
