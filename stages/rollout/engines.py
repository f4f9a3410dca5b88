"""The engine that a stage's settings name, over a model folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.rollout.protocol import Rollout
from stages.rollout.settings import RolloutSettings


@contextmanager
def open_rollout(settings: RolloutSettings, folder: Path, device: str, log: Path) -> Iterator[Rollout]:
    """An engine that samples from the model in `folder` while the block lasts. `log`: where vLLM's own words go."""
    if settings.engine == "torch":
        from stages.rollout.torch_engine import load_rollout

        yield load_rollout(folder, device, settings)
        return
    from stages.rollout.torch_engine import load_tokenizer, pick_device
    from stages.rollout.vllm_engine import VllmRollout

    with VllmRollout(folder, load_tokenizer(folder), settings, device=pick_device(device), log=log) as rollout:
        yield rollout
