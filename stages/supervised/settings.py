"""Settings of supervised training. No torch here: a recipe is checked without it."""

import math
from typing import Annotated, Self

from pydantic import Field, model_validator

from stages.contract.config import EXECUTION, Config
from stages.engine.settings import Checkpoints, Training


class Packing(Config):
    """How documents are packed. It changes speed and memory, not the loss."""

    micro_tokens: int = Field(default=1024, ge=1)
    """Tokens of a micro-batch, about: memory grows with it. On a CPU 1024 was as fast as 2048 (SmolLM2-135M)."""


class Validation(Config):
    """Documents that are never trained on, whose loss is measured before, during and after training. By default none."""

    share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the documents that is held out, rounded up to whole problems."""
    count: int | None = Field(default=None, ge=1)
    """Documents held out instead of a share of them, rounded up to whole problems."""
    every: Annotated[int, EXECUTION] = Field(default=50, ge=1)
    """Steps between two measurements; before the first step and after the last there is always one."""

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if self.share and self.count is not None:
            raise ValueError("give `share` or `count`, not both")
        return self

    def wanted(self, documents: int) -> int:
        """How many of so many documents are to be held out."""
        return self.count if self.count is not None else math.ceil(self.share * documents)


class Supervised(Training):
    """Settings of the loop, beside the optimizer's."""

    batch: int = Field(default=64, ge=1)
    """Documents of a step, over all ranks (the paper: 64)."""
    packing: Annotated[Packing, EXECUTION] = Packing()
    """Micro-batches."""
    checkpoints: Annotated[Checkpoints, EXECUTION] = Checkpoints(every=200)
    """When checkpoints are written."""
