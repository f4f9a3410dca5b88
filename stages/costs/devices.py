"""What work costs on a device: seconds per unit of each amount, memory, links, price.

A GPU's come from configs/plan/devices.yaml; a CPU's, which all processes of a stage share, from runs measured on it (fit.py).
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from stages.contract.config import Config
from stages.contract.errors import UserError
from stages.contract.suggest import nearest
from stages.costs.amounts import SHARED, Amounts
from stages.costs.fit import Measured, fitted
from stages.store.files import read_json

PLAN = Path(__file__).resolve().parents[2] / "configs" / "plan"
STORAGE = 1.0e9
"""Bytes a second of the disk of a GPU's machine: assumed."""
GPU_START = 90.0
"""Seconds until a stage's processes, and vLLM beside them, are there: assumed (on a CPU vLLM took 40)."""
HANDLED = ("answers", "steps")
"""Amounts that are Python's work on any machine: a GPU's have the CPU's measured seconds."""


class Gpu(Config):
    """A GPU as its data sheet and others' measurements have it."""

    peak: float = Field(gt=0)
    """Dense bfloat16 operations a second."""
    memory: float = Field(gt=0)
    """Bytes."""
    bandwidth: float = Field(gt=0)
    """Bytes a second of its memory."""
    node: int = Field(ge=1)
    """GPUs of a machine."""
    link: float = Field(gt=0)
    """Bytes a second, one way, between GPUs of a machine."""
    network: float = Field(gt=0)
    """Bytes a second of a GPU between machines."""
    price: float = Field(ge=0)
    """Of an hour."""
    training_share: float = Field(gt=0, le=1)
    """Share of the peak that whole texts reach, forward and backward."""
    bandwidth_share: float = Field(gt=0, le=1)
    """Share of the bandwidth that decoding and the optimizer reach."""
    all_to_all: dict[int, float]
    """Seconds of an all-to-all there and back of a layer of experts, by number of GPUs that hold one copy."""


class Device:
    """Seconds per unit, and what else a plan asks of a device."""

    def __init__(self, name: str, rates: dict[str, float], gpu: Gpu | None, memory: float, source: str) -> None:
        """`gpu`: None for a CPU, whose processes share it; `memory`: bytes, of a GPU or the machine; `source`: of the rates."""
        self.name, self.rates, self.gpu, self.memory, self.source = name, rates, gpu, memory, source

    def seconds(self, amounts: Amounts, processes: int = 1, width: int = 1) -> float:
        """Of one of so many processes, whose work is spread over `width` GPUs that hold one copy of the weights."""
        total = 0.0
        for name, amount in amounts.items():
            if name == "exchange_bytes" and self.gpu is not None:
                continue  # by itself: it runs beside the rest
            shared = name in SHARED
            factor = (processes if self.gpu is None else 1 / width) if shared else 1.0
            total += amount * self.rates.get(name, 0.0) * factor
        return total

    def exchange(self, amounts: Amounts, processes: int) -> float:
        """Seconds of what processes send each other, on GPUs. (On a CPU it is in `seconds`.)"""
        if self.gpu is None or processes == 1:
            return 0.0
        return amounts.get("exchange_bytes", 0.0) / (self.gpu.link if processes <= self.gpu.node else self.gpu.network)

    def all_to_all(self, width: int) -> float:
        """Seconds of a layer of experts' all-to-all when one copy of the weights is on so many GPUs."""
        if self.gpu is None or width == 1:
            return 0.0
        known = sorted(self.gpu.all_to_all)
        return self.gpu.all_to_all[next((size for size in known if size >= width), known[-1])]


@cache
def gpus() -> dict[str, Gpu]:
    """Name -> GPU."""
    return {name: Gpu.model_validate(facts) for name, facts in yaml.safe_load(_text("devices.yaml")).items()}


def gpu_device(name: str, calibrated: dict[str, float]) -> Device:
    """A GPU; `calibrated`: this machine's rates, of which the Python's are taken.

    Raises UserError for one that is not known.
    """
    if name not in gpus():
        raise UserError(f"no device `{name}`", where="--gpu", mend=nearest(name, [*gpus(), "cpu"]))
    gpu = gpus()[name]
    moved = 1 / (gpu.bandwidth * gpu.bandwidth_share)
    rates = {
        "product_flop": 1 / (gpu.peak * gpu.training_share),
        "decode_flop": 1 / (gpu.peak * gpu.training_share),
        "decode_bytes": moved,
        "optimizer_bytes": moved,
        "stored_bytes": 1 / STORAGE,
        "starts": GPU_START,
        **{amount: calibrated.get(amount, 0.0) for amount in HANDLED},
    }
    return Device(name, rates, gpu, gpu.memory, "data sheet and published efficiencies (configs/plan/devices.yaml)")


def cpu_device(rates: dict[str, float], memory: float, source: str) -> Device:
    """The machine at hand, by measured rates."""
    return Device("cpu", rates, None, memory, source)


def shipped() -> list[Measured]:
    """The measured runs that come with the code."""
    return [Measured.model_validate(item) for item in json.loads(_text("calibration.json"))["runs"]]


def rates_of(own: Path) -> tuple[dict[str, float], str]:
    """Seconds per unit of the machine at hand, and where they come from: `own` (of `r1 plan --calibrate`), else the shipped."""
    if own.is_file():
        try:
            document = read_json(own)
            runs = [Measured.model_validate(item) for item in document["runs"]]
            rates = _rates(document)
        except (OSError, ValueError, LookupError, TypeError) as error:
            mend = "write it again with `r1 plan --calibrate`, or remove it"
            raise UserError("not a readable calibration", where=str(own), mend=mend) from error
        return rates or fitted(runs), f"{len(runs)} runs measured on this machine ({own})"
    document = json.loads(_text("calibration.json"))
    place = "2 cores of an EPYC (configs/plan/calibration.json), not on this machine"
    return _rates(document), f"{len(document['runs'])} runs measured on {place}"


def _rates(document: dict[str, Any]) -> dict[str, float]:
    """The fit that a calibration holds beside its runs; a fit takes seconds, most of them to import scipy."""
    return {str(name): float(value) for name, value in document.get("rates", {}).items()}


def _text(name: str) -> str:
    return (PLAN / name).read_text(encoding="utf-8")
