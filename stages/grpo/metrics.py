"""The metrics of an RL stage: their names, and how they are read off groups.

The same names are in the journal, in MLflow, in the progress bar and in reports.
"""

from collections.abc import Sequence
from statistics import fmean, pstdev

import torch

from stages.grpo.advantages import zero_variance
from stages.problems.episode import Episode, Group

NAMES = {
    "train/loss": "policy loss plus weighted KL, of the whole batch",
    "train/lr": "learning rate of the step",
    "train/grad_norm": "global norm of the gradient before clipping",
    "train/kl": "k3 against the reference, mean over trained tokens (only with a reference)",
    "train/entropy": "entropy of the policy in nats, mean over trained tokens",
    "train/clip_fraction_low": "share of trained tokens whose gradient the lower clip took away",
    "train/clip_fraction_high": "share of trained tokens whose gradient the upper clip took away",
    "train/mismatch_kl": "k3 between sampler and trainer on the sampled tokens; healthy below 1e-3",
    "train/mismatch_max": "largest difference of sampler's and trainer's log-probability on a token",
    "reward/total": "weighted reward, mean over answers",
    "reward/std": "its standard deviation over answers",
    "reward/accuracy": "share of right answers, without verdict counted as not right",
    "reward/format": "share of answers in the strict format",
    "reward/language": "share of the thinking in the target language, mean over answers that think",
    "rollout/length": "tokens of an answer, mean",
    "rollout/length_right": "tokens of a right answer, mean",
    "rollout/length_wrong": "tokens of a wrong answer, mean",
    "rollout/truncated": "share of answers cut at the limit",
    "rollout/no_verdict": "share of answers the verifier had no verdict on",
    "rollout/zero_variance": "share of groups whose rewards are all equal: they carry no signal",
    "eval/reward": "weighted reward on held-out problems",
    "eval/accuracy": "share of right answers on held-out problems",
    "eval/format": "share in the strict format on held-out problems",
    "eval/language": "share of the thinking in the target language on held-out problems",
    "eval/length": "tokens of an answer on held-out problems, mean",
    "time/step": "seconds of the step",
    "time/sample": "seconds of sampling and scoring",
    "time/update": "seconds of preparing and updating",
    "time/eval": "seconds of held-out evaluation",
    "time/tokens_per_second": "sampled tokens per second of the step",
}
"""Name -> what it is. A metric that cannot be measured in a step is left out of it."""


def reward_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Mean reward and its parts."""
    found = {
        "reward/total": fmean(e.scored.total for e in episodes),
        "reward/std": pstdev([e.scored.total for e in episodes]),
    }
    for part in ("accuracy", "format", "language"):
        values = [e.scored.parts[part] for e in episodes if part in e.scored.parts]
        if values:
            found[f"reward/{part}"] = fmean(values)
    return found


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Lengths, truncation, verdicts, groups without signal."""
    episodes = [episode for group in groups for episode in group.episodes]
    found = {
        "rollout/length": fmean(len(e.completion_ids) for e in episodes),
        "rollout/truncated": fmean(float(e.truncated) for e in episodes),
        "rollout/no_verdict": fmean(float(e.scored.verdict == "none") for e in episodes),
        "rollout/zero_variance": fmean(float(zero_variance(*rewards(group))) for group in groups),
    }
    for verdict in ("right", "wrong"):
        lengths = [len(e.completion_ids) for e in episodes if e.scored.verdict == verdict]
        if lengths:
            found[f"rollout/length_{verdict}"] = fmean(lengths)
    return found


def rewards(group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, G) rewards of a group in float64, and (1, G) whether each has a verdict."""
    totals = torch.tensor([[e.scored.total for e in group.episodes]], dtype=torch.float64)
    return totals, torch.tensor([[e.scored.verdict != "none" for e in group.episodes]])
