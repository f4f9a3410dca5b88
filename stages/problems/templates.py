"""Templates: how a question becomes a prompt (DeepSeek-R1, table 1), with or without worked examples."""

from typing import Literal, Self

from pydantic import Field, model_validator

from stages.contract.config import Config

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"

R1_ZERO = (
    "A conversation between User and Assistant. The User asks a question and the Assistant solves it. The Assistant first "
    "thinks about the reasoning process in the mind and then provides the User with the answer. The reasoning process and "
    f"the answer are enclosed within {THINK_OPEN} {THINK_CLOSE} and {ANSWER_OPEN} {ANSWER_CLOSE} tags, respectively, i.e., "
    f"{THINK_OPEN} reasoning process here {THINK_CLOSE} {ANSWER_OPEN} answer here {ANSWER_CLOSE}."
)
"""The system text of R1-Zero's template, in the paper's terms."""


class Example(Config):
    """A worked example, shown before the question."""

    question: str = Field(min_length=1)
    """What the User asks."""
    thinking: str = Field(min_length=1)
    """What the Assistant thinks, without tags."""
    answer: str = Field(min_length=1)
    """What the Assistant answers, without tags."""


class Template(Config):
    """How a question becomes a prompt."""

    name: Literal["question", "r1_zero"] = "r1_zero"
    """`r1_zero`: the paper's template; `question`: the question alone (the toy)."""
    examples: tuple[Example, ...] = ()
    """Worked examples in the paper's tags; small base models need them to find the format at all. The paper has none."""
    open_thinking: bool = False
    """The prompt ends with `<think>`, so that every answer begins with thinking. The paper leaves it to the model."""

    @model_validator(mode="after")
    def _examples_need_speakers(self) -> Self:
        if self.examples and self.name == "question":
            raise ValueError("the template `question` takes no examples")
        return self

    @property
    def opened(self) -> str:
        """The part of the answer that the prompt has already opened: `<think>` or nothing."""
        return THINK_OPEN if self.open_thinking else ""

    def render(self, question: str) -> str:
        """The prompt for a question. Its text is put in as it is: braces or tags in it mean nothing."""
        if self.name == "question":
            return question + self.opened
        worked = [
            f"User: {e.question}\nAssistant: {THINK_OPEN} {e.thinking} {THINK_CLOSE}\n{ANSWER_OPEN} {e.answer} {ANSWER_CLOSE}"
            for e in self.examples
        ]
        asked = f"User: {question}\nAssistant:" + (f" {self.opened}" if self.opened else "")
        return "\n\n".join([R1_ZERO, *worked, asked])
