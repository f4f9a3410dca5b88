"""The engine that a stage's settings name, over a model folder."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.rollout.protocol import Rollout
from stages.rollout.settings import RolloutSettings
from stages.store.files import TEMPORARY


@contextmanager
def open_rollout(settings: RolloutSettings, folder: Path, device: str, log: Path) -> Iterator[Rollout]:
    """An engine that samples from the model in `folder` while the block lasts. `log`: where vLLM's own words go."""
    if settings.engine == "torch":
        from stages.rollout.torch_engine import load_rollout

        yield load_rollout(folder, device, settings)
        return
    from stages.rollout.torch_engine import load_tokenizer, pick_device
    from stages.rollout.vllm.engine import VllmRollout

    with (
        merged_folder(folder, log.parent) as plain,
        VllmRollout(plain, load_tokenizer(plain), settings, device=pick_device(device), log=log) as rollout,
    ):
        yield rollout


@contextmanager
def merged_folder(folder: Path, place: Path) -> Iterator[Path]:
    """A model folder without adapters while the block lasts: `folder` itself, or one in `place` with its adapters merged.

    The merged weights are float32, which vLLM then computes in: slower than in 16 bits, where the update would be lost.
    """
    from stages.engine.adapter_folder import has_adapter

    if not has_adapter(folder):
        yield folder
        return
    import torch

    from stages.engine.adapters import merged
    from stages.rollout.torch_engine import load_model, load_tokenizer

    with tempfile.TemporaryDirectory(prefix=f"{TEMPORARY}merged-", dir=place) as temporary:
        model = merged(load_model(folder), torch.float32)
        model.save_pretrained(temporary)
        load_tokenizer(folder).save_pretrained(temporary)
        del model
        yield Path(temporary)
