"""Settings of the optimizer and of DeepSpeed. No torch here: a recipe is checked without it."""

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from stages.contract.config import EXECUTION, CheckpointRef, Config, Expanded, ExternalFile
from stages.contract.errors import UserError
from stages.engine.deepspeed_file import check_keys
from stages.store.json_keys import unique_keys

PRESETS = Path(__file__).resolve().parents[2] / "configs" / "deepspeed"


def _known(name: str) -> str:
    if not deepspeed_file(name).is_file():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.json")))
        raise ValueError(f"no DeepSpeed settings `{name}`: known are {known}, or the path of a JSON file")
    try:
        deepspeed_settings(name)
    except UserError as error:
        raise ValueError(str(error)) from error
    return name


def _is_path(name: str) -> bool:
    return name.endswith(".json")


DeepSpeedName = Annotated[str, Expanded, AfterValidator(_known), ExternalFile(only=_is_path, settings=True)]
"""Name of a file in configs/deepspeed (zero0 to zero3), which changes memory and speed, not the result; or the path of one of
your own, whose content is part of the fingerprint."""


def deepspeed_file(name: str) -> Path:
    """The JSON file that a name or path means."""
    return Path(name) if _is_path(name) else PRESETS / f"{name}.json"


def deepspeed_settings(name: str) -> dict[str, Any]:
    """DeepSpeed's settings as the file has them.

    Raises UserError when the file is not JSON, names a ZeRO stage that does not exist, or a key that DeepSpeed does not know.
    """
    path = deepspeed_file(name)
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"not readable as JSON ({error})", where=str(path)) from error
    zero = settings.get("zero_optimization", {}) if isinstance(settings, dict) else None
    if not isinstance(zero, dict):
        raise UserError("not a mapping with a mapping `zero_optimization`", where=str(path), mend="see configs/deepspeed")
    if (stage := zero.get("stage", 0)) not in (0, 1, 2, 3):
        raise UserError(f"no ZeRO stage {stage}", where=f"{path}: zero_optimization.stage", mend="use 0, 1, 2 or 3")
    check_keys(settings, str(path))
    return settings


Moment = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Config):
    """AdamW and its learning rate."""

    lr: float = Field(default=1e-6, gt=0)
    """Peak learning rate. R1-Zero: 3e-6 for a 671B model; small models want more."""
    schedule: Literal["constant", "cosine"] = "constant"
    """`cosine` falls from `lr` to `lr * final_share` over the stage."""
    final_share: float = Field(default=0.1, ge=0, le=1)
    """Where the cosine ends, as a share of `lr` (the paper's SFT: a tenth)."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps in which the learning rate rises linearly."""
    betas: tuple[Moment, Moment] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The gradient's global norm is clipped to this."""

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of step `step` (from 0) of `steps`: a function of the step alone, so nothing of it can be lost."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.lr * (self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class Training(Optimizer):
    """What every training stage has."""

    continues: CheckpointRef | None = None
    """`STAGE@STEP`: start from that stage's checkpoint, optimizer and all, instead of from the beginning: more steps, or other
    settings from a step on. Steps are counted on from there, so `steps` must be larger. The checkpoint must still be there: of
    a finished stage the last two are, and those of `checkpoints.keep_every`."""
    gradient_checkpointing: Annotated[bool, EXECUTION] = False
    """Keep each layer's input alone and compute the layer again for its gradient: less memory, a fourth more arithmetic."""
    deterministic: Annotated[bool, EXECUTION] = True
    """On a GPU, sum gradients in a fixed order, so that a resumed run has the bits of an uninterrupted one. false: faster, and
    for models with an operation that knows no such order. A CPU's order is always fixed."""


class Lora(Config):
    """Low-rank adapters (arXiv 2106.09685): small matrices are trained beside frozen weights, and no optimizer's moments are
    held for those. It learns something else than full training does; the paper trains all weights.

    The adapters are float32 beside weights of any format, and trainer and sampler compute with them in place. A stage on a
    model that has adapters trains these further, so its settings must be the same.
    """

    rank: int = Field(default=16, ge=1)
    """Rank of the adapters."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapters' product is multiplied by `alpha / rank`."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the layers that get one, such as `[q_proj, v_proj]`; `all-linear`: every linear layer but the head."""
    merge: bool = False
    """false: the stage's model is the unchanged weights with the adapter beside them, in `adapter/` in peft's format. true: a
    model without adapters, whose sums are written in float32: 16 bits would lose most of a small update."""


class Checkpoints(Config):
    """When checkpoints are written. None of it changes the result."""

    every: int = Field(default=10, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(default=2, ge=1)
    """The newest checkpoints that are kept."""
    keep_every: int | None = Field(default=None, ge=1)
    """Checkpoints of every so many steps are kept for good; null: none."""
