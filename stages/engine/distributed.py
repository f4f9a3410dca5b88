"""Ranks: the process group, and what all ranks must agree on. A run of one process is a group of one."""

import datetime as dt
import os
import socket
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, TCPStore

from stages.contract.errors import UserError
from stages.runtime.clock import clock
from stages.runtime.platform import LOOPBACK, loopback_interface

T = TypeVar("T")
PATIENCE = dt.timedelta(hours=2)
"""How long a rank waits for another: ranks decode unequally long, and rank 0 writes and digests checkpoints alone."""


def join(device: str) -> None:
    """Join the process group torchrun describes, or make one of this process alone."""
    if dist.is_initialized():
        return
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":  # before the group is made: NCCL takes the current device for the objects it gathers
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # Sums in a fixed order (Engine.accumulate) want the first; the second would fill every new array with NaN meanwhile.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    launched = dist.is_torchelastic_launched()
    here = not launched or os.environ["MASTER_ADDR"] == LOOPBACK
    if here:  # left alone, both listen on the machine's own address
        _use_loopback()
    if here and launched and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, timeout=PATIENCE, store=_store(rank, ranks), rank=rank, world_size=ranks)
    elif launched:
        dist.init_process_group(backend, timeout=PATIENCE)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed refuses to start without it


def _use_loopback() -> None:
    """Have gloo and NCCL listen on the loopback interface, unless the environment names another one."""
    unset = [name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name not in os.environ]
    if not unset:
        return
    interface = loopback_interface()
    if interface is None:
        what = f"no network interface has the address {LOOPBACK}"
        raise UserError(what, where="network", mend="bring loopback up (Linux: `ip link set lo up`)")
    os.environ.update(dict.fromkeys(unset, interface))


def _store(rank: int, ranks: int) -> TCPStore:
    """Where the ranks of one machine meet. PyTorch's own store would listen on every address of the machine."""
    port = int(os.environ["MASTER_PORT"])
    if rank:
        return TCPStore(LOOPBACK, port, ranks, is_master=False, timeout=PATIENCE)
    listener = socket.create_server((LOOPBACK, port))
    return TCPStore(
        LOOPBACK, port, ranks, is_master=True, timeout=PATIENCE, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def any_rank(flag: bool) -> bool:
    """Whether any rank says yes; all ranks get the same answer."""
    return bool(max(gather(flag)))


def gather(item: T) -> list[T]:
    """Every rank's item, in the order of ranks, on every rank."""
    if dist.get_world_size() == 1:
        return [item]
    found: list[Any] = [None] * dist.get_world_size()
    with clock.span("wait"):
        dist.all_gather_object(found, item)
    return found


def from_first(item: Any) -> Any:
    """Rank 0's item, on every rank."""
    found = [item]
    with clock.span("wait"):
        dist.broadcast_object_list(found, src=0)
    return found[0]


def to_first(item: T, source: int) -> T | None:
    """The item of rank `source`, on rank 0; None elsewhere. Every rank calls it."""
    with clock.span("wait"):
        if number() == source:
            dist.send_object_list([item], 0)
        elif number() == 0:
            found: list[Any] = [None]
            dist.recv_object_list(found, source)
            return cast("T", found[0])
    return None


def barrier() -> None:
    """Wait for all ranks."""
    with clock.span("wait"):
        dist.barrier()


def local_device(device: str) -> torch.device:
    """The device of this rank: on CUDA, the one of its local rank."""
    return torch.device("cuda", dist.get_node_local_rank(0)) if device == "cuda" else torch.device("cpu")


def bind_thread(device: torch.device) -> None:
    """Make `device` the calling thread's CUDA device. It is a setting of each thread, and a new thread's is GPU 0."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def size() -> int:
    """Number of ranks."""
    return dist.get_world_size()


def number() -> int:
    """Number of this rank, from 0."""
    return dist.get_rank()


def local_number() -> int:
    """Number of this rank on its node, from 0."""
    return dist.get_node_local_rank(0)
