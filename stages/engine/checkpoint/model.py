"""The policy of a checkpoint as a model: what a stage that still trains has come to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stages.contract.errors import UserError
from stages.engine.adapters import adapted
from stages.engine.checkpoint.checkpointer import broken, newest_whole, steps
from stages.engine.checkpoint.reader import Stored
from stages.engine.settings import Lora


def chosen_checkpoint(folder: Path, step: int | None) -> Path:
    """The checkpoint of that step, or the newest whole one, in a stage's folder of checkpoints.

    Raises UserError when there is none, or the one asked for is not whole.
    """
    there = ", ".join(map(str, steps(folder))) or "none"
    if step is None:
        found = newest_whole(folder)
        if found is None:
            raise UserError("there is no whole checkpoint yet", where=str(folder), mend="wait for the first")
        return found
    found = folder / f"step-{step:06d}"
    if reason := broken(found) if found.is_dir() else "it is not there":
        raise UserError(f"no whole checkpoint of step {step}: {reason}", where=str(folder), mend=f"steps: {there}")
    return found


def checkpoint_model(checkpoint: Path, start: Callable[[], Any], lora: Lora | None, seed: int) -> Any:
    """The model of a whole checkpoint, adapters in place. `start` loads the model that training began with.

    Raises UserError when the checkpoint is of another model.
    """
    model = adapted(start(), lora, seed)
    stored = Stored(checkpoint).part("policy")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(stored(f"model.{name}|weight"))  # the trainer has the model under this name
    return model
