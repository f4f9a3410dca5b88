"""The configuration of a `curate` stage."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.contract.config import ADDED, EXECUTION, ModelRef
from stages.curation.duplicates import Duplicates
from stages.curation.few_shot import FewShot
from stages.curation.filters import Filters
from stages.curation.rewrite import Rewrite
from stages.problems.decontamination import Decontaminated
from stages.problems.sources import ProblemSource, unjudged_at, verifiers_asked
from stages.problems.templates import Template
from stages.rewards.answers.verifiers import used
from stages.rewards.score import Rewards
from stages.rollout.protocol import Sampling
from stages.rollout.settings import RolloutSettings


class CurateConfig(Decontaminated):
    """Which model answers which problems, and what is kept."""

    kind: Literal["curate"]
    """This kind."""
    sampler: ModelRef
    """The stage whose model is sampled: R1-Zero for cold-start data, or any model that `few_shot` leads to long thoughts."""
    problems: ProblemSource
    """Where the problems come from."""
    count: int | None = Field(default=None, ge=1)
    """How many problems of the source, from its start; all by default."""
    samples: int = Field(default=4, ge=1)
    """Answers sampled per problem."""
    template: Template = Template()
    """How a question becomes a prompt; the dataset's prompts have this form."""
    few_shot: Annotated[FewShot | None, ADDED] = None
    """Worked examples from a file, put before each question while sampling; the dataset's prompts are without them."""
    sampling: Sampling = Sampling()
    """How answers are sampled (the paper: temperature 1)."""
    rewards: Rewards = Rewards()
    """How answers are judged: verifier, format, target language. The weights do not matter here."""
    filters: Filters = Filters()
    """What makes an answer readable."""
    rollout: RolloutSettings = RolloutSettings()
    """Which engine samples."""
    duplicates: Annotated[Duplicates | None, ADDED] = None
    """Which good answers count as near-duplicates of one already chosen and are left out; null: none."""
    choose: Literal["shortest", "first", "random"] = "shortest"
    """Which of a problem's good answers come first: those of fewest tokens, those sampled first, or at random by the seed."""
    per_problem: Annotated[int, ADDED] = Field(default=1, ge=1)
    """Most answers kept per problem."""
    rewrite: Annotated[Rewrite | None, ADDED] = None
    """Has the chosen answers rewritten by another model, and judges them again; null: they stay the model's own words."""
    review: Annotated[Literal["none", "required"], ADDED] = "none"
    """`required`: the stage stops with a file for people to fill in, and goes on with the answers that they accept."""
    review_file: Annotated[Literal["csv", "jsonl"], EXECUTION] = "csv"
    """The form of that file. One that is there already is used, whatever its form."""
    chunk: Annotated[int, EXECUTION] = Field(default=32, ge=1)
    """Problems sampled at once; a stopped stage goes on after its last finished chunk."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.few_shot is not None and self.template.name == "question":
            raise ValueError("the template `question` takes no worked examples (few_shot)")
        if key := unjudged_at(self.problems, "problems"):
            raise ValueError(f"{key} is unjudged, and only right answers are kept: leave it out, or name a verifier for it")
        verifiers = used(verifiers_asked(self.problems), self.rewards.verifier)
        if self.rewrite is not None and self.rewrite.summary and verifiers != ["math"]:
            raise ValueError("a summary holds more than the final answer: rewrite.summary needs the verifier `math`")
        return self
