"""Whether training has moved a model's weights at all."""

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


def same_weights(before: Path, after: Path) -> bool:
    """Whether the model folder `after` has the weights of `before`; the first tensor that differs decides.

    Adapters beside the weights count as unchanged while their B is zero: then they add nothing, whatever A is. A tensor that
    only `after` has makes the two different.
    """
    with _tensors(before) as old, _tensors(after) as new:
        return bool(new) and all(_same(name, old, new) for name in new)


def _same(name: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    if name in old:
        mine, theirs = old[name].get_tensor(name), new[name].get_tensor(name)
        if mine.dtype != theirs.dtype:
            mine, theirs = mine.float(), theirs.float()
        return mine.shape == theirs.shape and torch.equal(mine, theirs)
    return "lora_A" in name or ("lora_B" in name and not bool(new[name].get_tensor(name).any()))


@contextlib.contextmanager
def _tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """Name of each tensor -> the open file that has it."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in sorted(folder.glob("*.safetensors"))]
        yield {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a mapping
