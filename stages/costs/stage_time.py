"""Hours of a stage on so many devices, and where they go: from one step's groups to seconds by span.

What is assumed of machines is here: replicas of the sampler work side by side and the slowest is waited for; processes train
side by side; ZeRO-3's exchange runs beside the arithmetic, all other exchange after it.
"""

from dataclasses import dataclass, field

from stages.costs.amounts import Amounts, sample_amounts
from stages.costs.devices import Device
from stages.costs.shape import Shape
from stages.costs.steps import Groups, Loop, sampled, train_spans

TORCH_CALL = 250e-6
"""Seconds of a layer in a step of decoding by PyTorch on a GPU: 25 kernels of 10 µs (assumed; vLLM replays a graph instead)."""


@dataclass(frozen=True)
class Sampler:
    """How answers are sampled."""

    replicas: int = 1
    width: int = 1
    """GPUs that hold one copy of the weights."""
    rows: float = 64
    """Answers in flight on a replica."""
    graph: bool = True
    """Whether steps of decoding are replayed (vLLM), not called kernel by kernel."""
    speculation: float = 1.0
    """Tokens of an answer that a step gives on average (more than 1 with speculative decoding)."""


@dataclass
class Spent:
    """Seconds by what they are spent on, of the whole stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: float = 0.0
    """Sampled, or trained on."""

    @property
    def total(self) -> float:
        """All seconds."""
        return sum(self.seconds.values())

    def add(self, name: str, seconds: float) -> None:
        """Add to a part."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def times(self, factor: float) -> "Spent":
        """So many times as much."""
        return Spent({name: value * factor for name, value in self.seconds.items()}, self.tokens * factor)


def sampling(shape: Shape, item: int, groups: Groups, sampler: Sampler, device: Device, processes: int) -> Spent:
    """Sampling these groups once. `waiting` is the part in which seats are empty because the longest answers go on."""
    mine = groups[:: sampler.replicas]  # the first has the longest answer
    work = sampled(mine, sampler.rows)
    steps = work.steps / sampler.speculation
    amounts = sample_amounts(shape, work, item, steps=steps)
    shared = device.seconds(amounts, min(processes, sampler.replicas), sampler.width)
    shared += steps * shape.expert_layers * device.all_to_all(sampler.width)
    if device.gpu is not None and not sampler.graph:
        shared += steps * shape.layers * TORCH_CALL
    seats = max(1.0, work.steps * min(sampler.rows, work.answers))
    busy = min(1.0, work.tokens / seats)
    spent = Spent(tokens=float(sum(answer for _, answers in groups for answer in answers)))
    spent.add("sampling", shared * busy)
    spent.add("waiting", shared * (1 - busy))
    return spent


def training(shape: Shape, item: int, groups: Groups, loop: Loop, device: Device, *, resident: bool = False) -> Spent:
    """The updates of one step.

    resident: weights stay where they are (tensor, pipeline, expert parallel) and nothing is gathered: the published shares of
    such training have its communication in them already.
    """
    spans = train_spans(shape, item, groups, loop)
    spent = Spent(tokens=float(sum(prompt + sum(answers) for prompt, answers in groups)))
    update, optimizer = (device.seconds(spans[name], loop.processes) for name in ("update", "optimizer"))
    if resident and device.gpu is not None:
        optimizer /= 1 if loop.zero else loop.processes
    else:
        # A process takes whole answers: in each update the one that has the longest is waited for.
        texts = sorted(answer for _, answers in groups for answer in answers)
        longest = sum(texts[-loop.minibatches :]) / loop.minibatches
        share = sum(texts) / loop.processes / loop.minibatches
        update *= max(1.0, longest / max(share, 1.0)) if device.gpu is not None else 1.0
        exchange = device.exchange(spans["update"], loop.processes)
        spent.add("exchange", max(0.0, exchange - update) if loop.zero == 3 else exchange)
    spent.add("update", update)
    spent.add("optimizer", optimizer)
    return spent


def handled(device: Device, answers: float, steps: float, stored: float = 0.0, starts: float = 0.0) -> float:
    """Seconds of preparing, judging and recording, of checkpoints and models on disk, of starting processes."""
    amounts: Amounts = {"answers": answers, "steps": steps, "stored_bytes": stored, "starts": starts}
    return device.seconds(amounts)
