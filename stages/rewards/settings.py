"""What an answer can earn: the settings of a stage's rewards. No torch here: a recipe is checked without it."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from stages.contract.config import ADDED, EXECUTION, Config, ExternalPath, ModelRef, UserFunction
from stages.problems.episode import PARTS, Verifier
from stages.rewards.code.sandbox import Sandbox, ready
from stages.rewards.language import Detection, Language
from stages.rewards.tags import AnswerPlace
from stages.rewards.verifier_pool.pool import Limits


class FunctionReward(Config):
    """A reward of the user's own."""

    function: UserFunction = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """`module:function`, of a file beside the recipe, in the working directory, or of an installed package. The file, and what
    it imports from these folders, is part of the fingerprint; stages/rewards/functions.py says what the function is given."""
    weight: float = 1.0
    """Weight of its number; 0 only measures."""

    @field_validator("function", mode="before")
    @classmethod
    def _no_file(cls, value: Any) -> Any:
        module, colon, function = value.partition(":") if isinstance(value, str) else ("", "", "")
        if colon and module.endswith(".py"):
            name = module.removesuffix(".py").removeprefix("./").replace("/", ".")
            raise ValueError(f"`{module}` is a file; write `{name}:{function}`, with the module's name")
        return value


class PreferenceModel(Config):
    """A reward model: sequence classification with one label."""

    stage: ModelRef | None = None
    """The stage whose model it is; or else give `path`."""
    path: ExternalPath | None = None
    """A Hugging Face folder (safetensors and tokenizer)."""
    reads: Literal["summary", "all"] = "summary"
    """What it judges: what follows the thinking (the paper's helpfulness) or the whole answer (its safety)."""
    max_tokens: int = Field(default=2048, ge=1)
    """Tokens of question and answer that it reads; what is longer is cut."""
    batch: Annotated[int, EXECUTION] = Field(default=16, ge=1)
    """Answers at once."""
    device: Annotated[Literal["auto", "cpu", "cuda"], EXECUTION] = "auto"
    """`auto` takes CUDA when PyTorch sees it."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.stage is None) == (self.path is None):
            raise ValueError("give exactly one of `stage` and `path`")
        return self


class Rewards(Config):
    """What an answer can earn. The weights are relative to each other: GRPO divides by the group's standard deviation."""

    accuracy: float = Field(default=1.0, ge=0)
    """Weight of a right final answer (0 or 1). The paper: equal to format."""
    format: float = Field(default=1.0, ge=0)
    """Weight of the tags in order (0 or 1). Small models may trade accuracy for it: then weigh it less."""
    language: float = Field(default=0.0, ge=0)
    """Weight of the share of the thinking in the target language (0 to 1). R1-Zero has none; the reasoning RL 1."""
    overlong: float = Field(default=0.0, ge=0)
    """Weight of the soft punishment of answers near `max_tokens` (−1 to 0; DAPO: 1)."""
    overlong_buffer: int | None = Field(default=None, ge=1)
    """Tokens before `max_tokens` in which it grows (DAPO: 4,096 before 20,480)."""
    repetition: Annotated[float, ADDED] = Field(default=0.0, ge=0)
    """Weight of the penalty for word sequences that stood in the answer before (−1 to 0)."""
    repetition_words: Annotated[int, ADDED] = Field(default=8, ge=1)
    """Length of these sequences; words are parted by whitespace and commas."""
    preference: Annotated[float, ADDED] = Field(default=0.0, ge=0)
    """Weight of what the reward model `preference_model` says (any number). The paper: in the last 400 steps of the last RL."""
    preference_model: Annotated[PreferenceModel | None, ADDED] = None
    """The reward model."""
    functions: Annotated[dict[str, FunctionReward], ADDED] = Field(default_factory=dict)
    """Rewards of your own by name: `brevity: {function: my_rewards:brevity, weight: 0.2}`."""
    random: float = Field(default=0.0, ge=0)
    """Weight of a fair coin that has nothing to do with the answer. A control arm: what a policy gains from it, its base had
    (Spurious Rewards, arXiv 2506.10947)."""
    gates: Annotated[dict[str, str], ADDED] = Field(default_factory=dict)
    """Part -> another that must be 1 for it to count: `{language: accuracy}` rewards the language of right answers only (and of
    those that are unjudged, which have no accuracy to wait for). A `preference` below 0 counts all the same."""
    verifier: Verifier = "math"
    """How a final answer is compared: `exact` text, `numeric` value, `math` (algebra), `reasoning_gym` (the scorer of the
    task that made the problem), or `code` (the answer is a program, the reference its tests: see rewards/code/). A
    source of problems may name its own `verifier`."""
    sandbox: Annotated[Sandbox, ADDED] = Sandbox()
    """What programs may use that the verifier `code` judges; `unsafe-none` alone turns the sandbox off."""
    answer_in: Annotated[AnswerPlace, ADDED] = "tags"
    r"""Where the final answer stands: in the paper's `<answer>` tags, or in the one `\boxed{}` after the thinking."""
    require_thinking: bool = True
    """Whether the format wants something inside `<think> </think>`."""
    language_target: Language = "english"
    """The language of the thinking; `digits` is for the toy's two scripts."""
    language_by: Annotated[Detection, ADDED] = "script"
    """`script` goes by letters: exact for languages with a script of their own, and takes French for English. `sentence` asks
    py3langid for the language of each sentence besides."""
    verify_timeout_s: Annotated[float, EXECUTION] = Field(default=2.0, gt=0)
    """Seconds of processor time that a verifier may take for an answer (usually 0.01); beyond it there is no verdict."""
    verify_wall_s: Annotated[float, EXECUTION] = Field(default=30.0, gt=0)
    """The same by the clock, for a verifier that waits; on a busy machine a process may get little of the processor."""
    verify_memory_mb: Annotated[int, EXECUTION] = Field(default=4096, ge=0)
    """MiB of address space that the verifier `reasoning_gym` or a function of your own may take for an answer, beside what its
    module and its `warm()` have loaded; beyond it there is a MemoryError; 0: no limit. `math` and `code` have limits of their
    own."""
    verify_processes: Annotated[int, EXECUTION] = Field(default=2, ge=1)
    """Processes that judge at the same time, on each rank; most answers are plain numbers and never reach them."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not (self.accuracy or self.beside_accuracy):
            raise ValueError("every weight is 0: nothing is rewarded")
        if bool(self.overlong) != (self.overlong_buffer is not None):
            raise ValueError("overlong and overlong_buffer go together: set both, or neither")
        if bool(self.preference) != (self.preference_model is not None):
            raise ValueError("preference and preference_model go together: set both, or neither")
        for name in self.functions:
            if name in PARTS or not name.isidentifier():
                raise ValueError(f"functions: `{name}` cannot name a reward; use a name of its own, of letters, digits and _")
        for name, gate in self.gates.items():
            for part in (name, gate):
                if part not in PARTS and part not in self.functions:
                    known = ", ".join([*PARTS, *self.functions])
                    raise ValueError(f"gates: there is no part `{part}`; known: {known}")
            if name == gate:
                raise ValueError(f"gates: `{name}` cannot be its own gate")
        return self

    def weight(self, part: str) -> float:
        """Weight of a part by its name."""
        return self.functions[part].weight if part in self.functions else float(getattr(self, part))

    def total(self, parts: Mapping[str, float]) -> float:
        """Weighted sum of the parts whose gates, if they have one, are 1; a gate that was not measured is shut.

        Only an unjudged answer has no accuracy: that counts 0, and a gate on it is open, since nobody can pass it. A preference
        may be below 0: a shut gate takes from it what it would add, and not what it would take, or being wrong would pay.

        >>> rewards = Rewards(accuracy=1.0, format=0.0, language=0.5, gates={"language": "accuracy"})
        >>> rewards.total({"accuracy": 1.0, "language": 0.8}), rewards.total({"accuracy": 0.0, "language": 0.8})
        (1.4, 0.0)
        >>> rewards.total({"language": 0.8})
        0.4
        """
        measured = parts if "accuracy" in parts else {**parts, "accuracy": 1.0}
        shut = {name for name, gate in self.gates.items() if measured.get(gate) != 1.0}
        counted = {name: value for name, value in parts.items() if name not in shut}
        if "preference" in parts and "preference" in shut:
            counted["preference"] = min(0.0, parts["preference"])
        return sum(self.weight(name) * value for name, value in counted.items())

    @property
    def beside_accuracy(self) -> bool:
        """Whether an answer without accuracy, an unjudged one, can earn anything."""
        own = any(reward.weight for reward in self.functions.values())
        return bool(self.format or self.language or self.preference or self.random or own)

    def remarks(self, verifiers: Collection[Verifier] | None = None) -> list[str]:
        """What must be said wherever results are shown. Raises UserError where programs are to be judged and cannot be held.

        verifiers: those that the stage's problems use; None: `verifier` alone.
        """
        return ready(self.sandbox) if "code" in ((self.verifier,) if verifiers is None else verifiers) else []

    def limits(self) -> Limits:
        """What judging one answer may take."""
        return Limits(self.verify_timeout_s, self.verify_wall_s, self.verify_memory_mb << 20)

    def located(self, inputs: Mapping[str, Path], where: str = "rewards") -> Self:
        """With the folder of the preference model's stage in the place of its name. `inputs`: role -> folder, of the stage."""
        model = self.preference_model
        if model is None or model.stage is None:
            return self
        found = model.model_copy(update={"stage": None, "path": str(inputs[f"{where}.preference_model.stage"])})
        return self.model_copy(update={"preference_model": found})
