"""vLLM follows the policy: before it samples, the trainer's weights of now are put into it.

Every rank has its own vLLM. The weights go through a folder in shared memory, one for every node, which its first rank writes;
or (`rollout.weights: broadcast`) from each rank's memory into its vLLM's, over NCCL from GPU to GPU.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.contract.errors import UserError
from stages.engine import distributed
from stages.engine.adapters import plain_weights
from stages.engine.deepspeed_engine import Engine
from stages.rollout.protocol import Rollout
from stages.rollout.settings import RolloutSettings
from stages.rollout.vllm.engine import VllmRollout
from stages.runtime.clock import clock
from stages.runtime.platform import SHARED_MEMORY
from stages.store.files import TEMPORARY
from stages.store.folders import StageFolder

ROOM = 1.2
"""Free shared memory that is wanted, as a multiple of the weights."""


@dataclass(frozen=True)
class PolicyRollout:
    """What the trainer's scene calls when its engine is not the trainer's own model."""

    fresh: Callable[[], Rollout]
    """Gives the engine, with the policy's weights of now. Every rank calls it."""
    rest: Callable[[], None]
    """Called when sampling is over until the next `fresh`."""


@contextmanager
def follow_policy(
    settings: RolloutSettings, policy: Engine, tokenizer: Any, start: Path, folder: StageFolder
) -> Iterator[PolicyRollout]:
    """An engine with the weights of `policy`, while the block lasts. `start`: a model folder of the same architecture."""
    first, direct, device = distributed.local_number() == 0, settings.weights == "broadcast", policy.device
    if direct and device.type == "cuda" and not settings.own_gpu:
        mend = "set `rollout.own_gpu: true`, or `weights: file`"
        raise UserError("NCCL does not join two processes on one GPU", where="rollout.weights", mend=mend)
    place = _place(policy, folder)
    log = folder.path / f"vllm-rank{distributed.number()}.log"
    with VllmRollout(start, tokenizer, settings, device=device.type, log=log, own_gpu=settings.own_gpu) as rollout:

        def fresh() -> Rollout:
            if direct:
                with clock.span("sample"), policy.whole_weights() as model:
                    rollout.send_weights(plain_weights(model), device)
                return rollout
            if first:  # what a killed attempt left
                shutil.rmtree(place, ignore_errors=True)
            try:
                with clock.span("sample"):
                    policy.save_model(place, tokenizer, main=first, merge=policy.model.dtype)
                    rollout.load_weights(place)
                distributed.barrier()
            finally:
                if first:
                    shutil.rmtree(place, ignore_errors=True)
            return rollout

        def rest() -> None:
            if settings.sleep and device.type == "cuda":
                rollout.sleep()

        yield PolicyRollout(fresh, rest)


def vllm_remark(dtype: Any) -> str:
    """What a stage with adapters says of vLLM, which samples with merged weights of the number format `dtype`."""
    name = str(dtype).removeprefix("torch.")
    lost = ": most of a small update is lost, and sampler and trainer differ by it; the engine `torch` does not merge"
    return f"vLLM sampled with the adapters merged in {name}{'' if name == 'float32' else lost}"


def _place(policy: Engine, folder: StageFolder) -> Path:
    """Where weights are handed over: shared memory when every rank sees room there, else the stage's folder.

    The name is the stage folder's, which one process works in at a time, so what a killed attempt left is found again.
    """
    with policy.whole_weights() as model:
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    room = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > ROOM * size
    if all(distributed.gather(room)):
        return SHARED_MEMORY / f"r1-weights-{hashlib.sha256(str(folder.path).encode()).hexdigest()[:16]}"
    return folder.path / f"{TEMPORARY}weights-{os.environ.get('GROUP_RANK', '0')}"  # nodes may share the stage's folder
