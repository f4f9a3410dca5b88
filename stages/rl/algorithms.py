"""How the algorithms differ, on one screen. No torch here: a recipe is checked without it.

Every algorithm is the same update with another advantage, ratio, aggregation and surrogate; what a row gives is the default of
the settings with the same names (`stages/rl/settings.py`), and each of those can be set on its own. The functions that the
words stand for are in `advantages.py`, `gae.py` and `losses.py`.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

AlgorithmName = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++-baseline", "ppo"]
AdvantageName = Literal["group", "group_centred", "leave_one_out", "batch_whitened", "gae"]
RatioName = Literal["token", "sequence", "product"]
AggregationName = Literal["sample_mean", "token_mean", "constant"]
SurrogateName = Literal["clip", "weight"]
Estimator = Literal["k1", "k2", "k3"]
KLPlace = Literal["loss", "reward"]


@dataclass(frozen=True)
class Algorithm:
    """A row of the table."""

    advantage: AdvantageName
    """`group` (r − mean)/(std + 1e-4); `group_centred` r − mean; `leave_one_out` r − mean of the others; `batch_whitened`
    r − mean, over the std of the batch; `gae` from a value model, per token."""
    ratio: RatioName
    """ρ of a `token`; of a `sequence`, the geometric mean over its tokens; or their `product`, the answer as one action."""
    aggregation: AggregationName
    """`sample_mean` 1/(N|o|) a token; `token_mean` 1/Σ|o|; `constant` 1/(N × longest answer allowed)."""
    surrogate: SurrogateName
    """`clip` min(ρA, clip(ρ)A); `weight` sg(clip(ρ)) A log π, whose gradient is never taken away."""
    clip_low: float | None
    """1 − this is the lower clip; None: there is none."""
    clip_high: float | None
    """1 + this is the upper clip."""
    kl: float
    """β."""
    kl_place: KLPlace
    """In the loss, or in the reward."""
    kl_estimator: Estimator
    """Which estimate of the KL."""
    source: str
    """Where it is from, and how this row departs from it."""
    max_resamples: int = 0
    """Dynamic sampling: further draws for groups with signal."""

    def defaults(self) -> dict[str, Any]:
        """Settings that the row gives a value."""
        given = vars(self)
        return {name: given[name] for name in given if name not in ("advantage", "surrogate", "source")}


_A = Algorithm
# fmt: off
ALGORITHMS: dict[AlgorithmName, Algorithm] = {
    #                advantage         ratio       aggregation    surrogate clip:low high   kl     in        estimator
    "grpo":       _A("group",          "token",    "sample_mean", "clip",   0.2,  0.2,  0.001, "loss",   "k3",
        "DeepSeekMath, arXiv 2402.03300, eq. 3-4; β of DeepSeek-R1"),
    "dr_grpo":    _A("group_centred",  "token",    "constant",    "clip",   0.2,  0.2,  0.0,   "loss",   "k3",
        "Understanding R1-Zero-like training, arXiv 2503.20783"),
    "dapo":       _A("group",          "token",    "token_mean",  "clip",   0.2,  0.28, 0.0,   "loss",   "k3",
        "DAPO, arXiv 2503.14476; its overlong reward is `rewards.overlong`, its filter `mask_truncated`", max_resamples=10),
    "gspo":       _A("group",          "sequence", "sample_mean", "clip",   3e-4, 4e-4, 0.0,   "loss",   "k3",
        "GSPO, arXiv 2507.18071"),
    "cispo":      _A("group",          "token",    "token_mean",  "weight", None, 4.0,  0.0,   "loss",   "k3",
        "MiniMax-M1, arXiv 2506.13585; it keeps its upper clip to itself: 1 + 4 = 5 is ScaleRL's, arXiv 2510.13786"),
    "rloo":       _A("leave_one_out",  "token",    "sample_mean", "clip",   0.2,  0.2,  0.0,   "reward", "k1",
        "Back to Basics, arXiv 2402.14740; there and in TRL an answer is one action (not divided by its length): `product`"),
    "reinforce++-baseline":
                  _A("batch_whitened", "token",    "token_mean",  "clip",   0.2,  0.2,  0.0,   "loss",   "k2",
        "REINFORCE++, arXiv 2501.03262; answers are whitened, where some whiten tokens"),
    "ppo":        _A("gae",            "token",    "token_mean",  "clip",   0.2,  0.2,  0.0,   "reward", "k1",
        "PPO, arXiv 1707.06347, as InstructGPT has it, arXiv 2203.02155"),
}
# fmt: on
assert tuple(ALGORITHMS) == get_args(AlgorithmName), "the table has a row for each name"

PresetName = Literal["r1", "field"]
PRESETS: dict[PresetName, dict[str, Any]] = {
    # DeepSeek-R1, arXiv 2501.12948 v2, section 3.2.1: ε 10, so that the lower clip is inert; β 0.001.
    "r1": {"clip_low": 10.0, "clip_high": 10.0, "kl": 0.001},
    # DAPO's clip-higher without KL, which most open recipes of 2025 took over.
    "field": {"clip_low": 0.2, "clip_high": 0.28, "kl": 0.0},
}
"""Named settings of clip and KL, over an algorithm's own."""


def with_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """`given` settings, and for what they leave out the values of their `preset`, then of their `algorithm`.

    An unknown name is left to the validation of its field.
    """
    algorithm, preset = given.get("algorithm", "grpo"), given.get("preset")
    row = ALGORITHMS.get(algorithm) if isinstance(algorithm, str) else None  # type: ignore[call-overload]
    over = PRESETS.get(preset, {}) if isinstance(preset, str) else {}  # type: ignore[call-overload]
    return {**(row.defaults() if row else {}), **over, **given}
