"""What an engine must remember, parameter by parameter and whole, however DeepSpeed has cut it.

DeepSpeed's own checkpoints are cut like the run that wrote them: another ZeRO stage or number of ranks cannot read them without
a conversion, which does not know ZeRO 0. Here every parameter is gathered (its float32 weight and the optimizer's moments), and
each rank keeps its share of the parameters. So a checkpoint reads the same under every layout, and ranks write side by side.
DeepSpeed's functions for this are public, but say nothing before the first step; for that, and for ZeRO 0, this module looks
inside the optimizer of the pinned version.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from stages.engine.lean_deepspeed import deepspeed
from stages.engine.muon import Muon

MOMENTS = ("exp_avg", "exp_avg_sq")
STEPS = "optimizer_steps"
"""Name of the entry with the number of optimizer steps taken."""


def read_state(engine: Any, rank: int, world_size: int) -> dict[str, Tensor]:
    """The share of this rank of the whole state, copied to the CPU. Every rank calls it.

    `NAME|weight`, `NAME|exp_avg` and `NAME|exp_avg_sq` for each of its parameters; without moments before the first step.
    """
    steps = _steps(engine)
    share = {STEPS: torch.tensor(steps)} if rank == 0 else {}
    for index, (name, parameter) in enumerate(_trained(engine)):
        for what in ("weight", *(_moments(engine, parameter) if steps else ())):
            whole = _read(engine, parameter, what)
            if index % world_size == rank:
                share[f"{name}|{what}"] = whole.detach().to("cpu", copy=True).contiguous()
    return share


def write_state(engine: Any, stored: Callable[[str], Tensor]) -> None:
    """Take the whole state from what `read_state` gave, which `stored` reads by name. Every rank calls it."""
    steps = int(stored(STEPS))
    if steps:
        _make_moments(engine, steps)
    for name, parameter in _trained(engine):
        for what in ("weight", *(_moments(engine, parameter) if steps else ())):
            _write(engine, parameter, what, stored(f"{name}|{what}").to(_device(engine)))


def _trained(engine: Any) -> Iterator[tuple[str, Any]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def _moments(engine: Any, parameter: Tensor) -> tuple[str, ...]:
    """Names of the optimizer's state of a parameter (or of a flat piece of parameters)."""
    optimizer = _torch_optimizer(engine)
    return optimizer.moments(parameter) if isinstance(optimizer, Muon) else MOMENTS


def _device(engine: Any) -> torch.device:
    found: torch.device = engine.device
    return found


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    found: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return found


def _is_plain(engine: Any) -> bool:
    """Whether there is no wrapper round the optimizer: ZeRO 0 in float32."""
    return engine.optimizer is _torch_optimizer(engine)


def _stepped(engine: Any) -> list[Tensor]:
    """The tensors that the torch optimizer steps: the parameters, or this rank's flat pieces of them."""
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        if (found := getattr(engine.optimizer, name, None)) is not None:
            return list(found)
    return [p for group in engine.optimizer.param_groups for p in group["params"]]


def _steps(engine: Any) -> int:
    state = _torch_optimizer(engine).state
    return max((int(state[p]["step"]) for p in _stepped(engine) if "step" in state.get(p, {})), default=0)


def _make_moments(engine: Any, steps: int) -> None:
    """Give every stepped tensor the moments that the optimizer would make in its first step."""
    state = _torch_optimizer(engine).state
    for piece in _stepped(engine):
        state[piece] = {
            "step": torch.tensor(float(steps), dtype=torch.float32, device=piece.device),
            **{moment: torch.zeros_like(piece, requires_grad=False) for moment in _moments(engine, piece)},
        }
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _read(engine: Any, parameter: Any, what: str) -> Tensor:
    if _is_plain(engine):
        found: Tensor = parameter if what == "weight" else engine.optimizer.state[parameter][what]
    elif what == "weight":
        found = deepspeed.utils.safe_get_full_fp32_param(parameter)
    else:
        found = deepspeed.utils.safe_get_full_optimizer_state(parameter, what)
    return found


def _write(engine: Any, parameter: Any, what: str, value: Tensor) -> None:
    if what != "weight" and _is_plain(engine):
        engine.optimizer.state[parameter][what].copy_(value)
    elif hasattr(parameter, "ds_id"):
        _write_piece(parameter, what, value)
    elif what != "weight":
        deepspeed.utils.safe_set_full_optimizer_state(parameter, value, what)
    elif not _is_plain(engine):
        deepspeed.utils.safe_set_full_fp32_param(parameter, value)
    if what == "weight":
        # The copy that the model computes with; under ZeRO 3 it is cut as well.
        cut = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=cut), torch.no_grad():
            if not cut or torch.distributed.get_rank() == 0:
                parameter.copy_(value)


def _write_piece(parameter: Any, what: str, value: Tensor) -> None:
    """ZeRO 3: this rank's piece. DeepSpeed's own function fails where the last piece is filled up (a head's one bias)."""
    optimizer = parameter._z3_optimizer
    state = None if what == "weight" else what
    piece, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=state)
    start = piece.numel() * optimizer._get_param_partition_rank(parameter)
    mine = value.flatten()[start : start + piece.numel()]
    piece.data[: mine.numel()].copy_(mine)
