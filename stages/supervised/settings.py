"""Settings of supervised training. No torch here: a recipe is checked without it."""

from typing import Annotated

from pydantic import Field

from stages.engine.settings import Checkpoints, Training
from stages.store.config import EXECUTION, Config


class Packing(Config):
    """How documents are packed. It changes speed and memory, not the loss."""

    micro_tokens: int = Field(default=1024, ge=1)
    """Tokens of a micro-batch, about: memory grows with it. On a CPU 1024 was as fast as 2048 (SmolLM2-135M)."""


class Supervised(Training):
    """Settings of the loop, beside the optimizer's."""

    batch: int = Field(default=64, ge=1)
    """Documents of a step, over all ranks (the paper: 64)."""
    packing: Annotated[Packing, EXECUTION] = Packing()
    """Micro-batches."""
    checkpoints: Annotated[Checkpoints, EXECUTION] = Checkpoints(every=200)
    """When checkpoints are written."""
