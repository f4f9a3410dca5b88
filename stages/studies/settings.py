"""What a study says: the section `study:` of a recipe, and what becomes of its claims. No torch here.

A study is a recipe written by a program: one of its stages is varied, for every variant and seed there is an arm (that stage,
and an evaluation of what came out of it), and a last stage of kind `study` compares the arms.
"""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from stages.contract.config import Config

Settings = dict[str, Any]
"""Settings of the varied stage, dotted keys allowed: `{algorithm: ppo, critic.lam: 0.95}`."""
Chosen = str | tuple[str, ...] | dict[str, str | tuple[str, ...]]
"""Variants: a name, several, or by level of the factors, `{place: reward}`. Factors that are not named are averaged over."""
START = "start"
"""In a claim: the model that each arm started from."""


class Claim(Config):
    """A sentence that the study may bear out or refute: `of` lies above, or below, what it is compared with."""

    says: str = Field(min_length=1)
    """The claim as a sentence."""
    metric: str = "accuracy"
    """What is compared: a number of the arm's evaluation (`accuracy`, `mean_length_right`, `pass_at_16`), a metric of its
    journal (`train/kl`: the mean over the last quarter of the steps), or `seconds_per_step`, `peak_memory_mib`, `steps`,
    `sampled_tokens`."""
    of: Chosen
    """The variants that the claim is about."""
    slope: str | None = None
    """A numeric setting of the stage, such as `kl`: compared is not the metric but its slope against this setting, fitted for
    each seed, and within each combination of the other factors."""
    log: bool = False
    """Whether the slope is against the setting's decimal logarithm: the change per tenfold."""
    above: Chosen | float | None = None
    """What it lies above: variants, `start` (the model that each arm started from), or a number."""
    below: Chosen | float | None = None
    """What it lies below."""

    @model_validator(mode="after")
    def _one_direction(self) -> Self:
        if (self.above is None) == (self.below is None):
            raise ValueError("give exactly one of `above` and `below`")
        if self.log and self.slope is None:
            raise ValueError("`log` belongs to a `slope`")
        if self.slope is not None and START in (self.above, self.below):
            raise ValueError("a slope cannot be compared with `start`, which has none; name variants, or a number")
        return self


def _named(names: Any, what: str) -> None:
    for name in names:
        if name in (START, "study") or not all(part.isidentifier() for part in str(name).split("-")):
            raise ValueError(f"`{name}` cannot name a {what}: use letters, digits, _ and -, and begin with a letter")


class Study(Config):
    """The section `study:`."""

    stage: str = "zero"
    """The stage that is varied."""
    evaluation: str = "evaluation"
    """The `evaluate` stage whose settings measure every arm, and the models that arms start from."""
    follow: tuple[str, ...] = ()
    """Settings that an arm's evaluation takes over from the arm's stage, such as `held_out` where variants differ in it."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2, 3, 4), min_length=1)
    """Seeds of the varied stage; what comes before it is computed once."""
    variants: dict[str, Settings] = Field(default_factory=dict)
    """Name -> settings of the varied stage."""
    factors: dict[str, dict[str, Settings]] = Field(default_factory=dict)
    """Name -> level -> settings. Each combination of levels is a variant, named by them: `reward-group-small`."""
    claims: dict[str, Claim] = Field(default_factory=dict)
    """Name -> claim."""
    only: tuple[str, ...] = ()
    """Only these variants, with the claims that need no others; by default all."""

    @field_validator("variants")
    @classmethod
    def _variants_named(cls, variants: dict[str, Settings]) -> dict[str, Settings]:
        _named(variants, "variant")
        return variants

    @field_validator("factors")
    @classmethod
    def _levels_named(cls, factors: dict[str, dict[str, Settings]]) -> dict[str, dict[str, Settings]]:
        for name, levels in factors.items():
            if len(levels) < 2:
                raise ValueError(f"factor `{name}` needs at least two levels")
            _named(levels, "level")
        return factors

    @model_validator(mode="after")
    def _has_variants(self) -> Self:
        if not self.variants and not self.factors:
            raise ValueError("name `variants`, or `factors`")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is named twice")
        return self


class Quantity(Config):
    """A number that each seed has: the mean of a metric over variants, or its slope."""

    blocks: tuple[tuple[str, ...], ...]
    """Variants; within a block their mean is taken, or the slope fitted, and the blocks are averaged."""
    x: dict[str, float] = Field(default_factory=dict)
    """Variant -> what the slope is against; empty: no slope."""
    words: str
    """What it is, for people."""


class Slopes(Config):
    """What the claims of a study take slopes against, for its tables and figure."""

    against: str
    """The setting, such as `kl`."""
    log: bool
    """Whether slopes are against its decimal logarithm."""
    x: dict[str, float]
    """Variant -> the setting, or its logarithm."""
    blocks: tuple[tuple[str, ...], ...]
    """Variants that differ in nothing but the setting; each block has a slope."""


class Comparison(Config):
    """A claim whose variants are known."""

    says: str
    """The sentence."""
    metric: str
    """What is compared."""
    of: Quantity
    """What the claim is about."""
    than: Quantity | float | Literal["start"]
    """What it is compared with."""
    direction: Literal["above", "below"]
    """On which side it lies if the claim holds."""
