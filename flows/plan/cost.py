"""What one stage takes on so many devices: its settings become groups, samplers and loops, and these seconds and bytes."""

from dataclasses import dataclass
from typing import Any

from flows.plan.counts import TOY_DOCUMENT, Counts
from flows.plan.loops import rl_loop, supervised_loop
from stages.costs.adapters import adapter_weights
from stages.costs.devices import Device
from stages.costs.memory import Memory, training_memory
from stages.costs.shape import Shape
from stages.costs.stage_time import Sampler, Spent, handled, sampling, training
from stages.costs.steps import Loop, dealt, spread_lengths

GPU_SHARE = 0.3
"""`rollout.memory_share` by default on a GPU."""
WHOLE_SHARE = 0.9
"""The sampler's share of a GPU that does nothing else meanwhile."""
SEATS = 256
"""Most answers that vLLM has in flight on a GPU."""
ADAM_BYTES = 12
"""Of a weight in a checkpoint."""


@dataclass(frozen=True)
class Place:
    """Where a plan's stages run."""

    device: Device
    gpus: int | None = None
    """Devices for every stage; None: each stage's `compute.processes`."""
    resident: bool = False
    """Weights stay where they are (tensor, pipeline, expert parallel) instead of ZeRO."""
    speculation: float = 1.0

    def processes(self, config: Any) -> int:
        """Of a stage."""
        return self.gpus or int(config.compute.processes)


WORKLOADS = {
    "rl": "rl",
    "sft": "supervised",
    "toy_base": "supervised",
    "curate": "sampled",
    "evaluate_model": "sampled",
}
"""Kind of stage -> the method of `_Cost` that says what its work on a model takes."""
STARTS_ONLY = frozenset({"model", "dataset", "evaluate", "summary", "gate", "study"})
"""Kinds that compute nothing with a model: their start, and a model that is written."""


def stage_cost(name: str, config: Any, model: tuple[Shape, int] | None, counts: Counts, place: Place) -> Spent:
    """Seconds and tokens of a stage; of one without work on a model, its start alone."""
    workload = WORKLOADS.get(config.kind)
    if workload is None and config.kind not in STARTS_ONLY:
        counts.assume(f"what a stage of kind `{config.kind}` takes is not known: only its start is counted")
    if model is None or workload is None:
        spent = Spent()
        # A gate hands its model on by links.
        stored = 2.0 * model[0].parameters * model[1] if model and config.kind == "model" else 0.0
        spent.add("other", handled(place.device, 0, 1, stored, 1))
        return spent
    cost = _Cost(name, config, *model, counts, place)
    spent = getattr(cost, workload)()
    assert isinstance(spent, Spent)
    return spent


class _Cost:
    def __init__(self, name: str, config: Any, shape: Shape, item: int, counts: Counts, place: Place) -> None:
        self.name, self.config, self.shape, self.item = name, config, shape, item
        self.counts, self.place, self.device = counts, place, place.device
        self.processes = place.processes(config)

    def rl(self) -> Spent:
        config, steps = self.config, self._steps()
        loop = self._loop(rl_loop(config))
        prompt, mean = self.counts.prompt_tokens(config, config.problems), self.counts.answer_tokens(self.name, config)
        answers = config.questions * config.samples
        groups = dealt(spread_lengths(answers, mean, config.sampling.max_tokens), config.questions, prompt)
        sampler = self._sampler(prompt + mean, config.questions)
        step = sampling(self.shape, self.item, groups, sampler, self.device, self.processes)
        trained = training(self.shape, self.item, groups, loop, self.device, resident=self.place.resident)
        for part, seconds in trained.seconds.items():
            step.add(part, seconds)
        if config.rollout.engine == "vllm" or loop.zero == 3:  # the weights into the sampler, through memory
            moved = self.shape.parameters * self.item / (self.processes if self.place.resident else 1)
            step.add("weights", 2 * moved / self._copied())
        step.add("other", handled(self.device, answers, 1))
        spent = step.times(steps)
        held = min(config.evaluation.problems, self.counts.problems(config.held_out))
        asked = dealt(spread_lengths(held * config.evaluation.samples, mean, config.sampling.max_tokens), held, prompt)
        once = sampling(self.shape, self.item, asked, self._sampler(prompt + mean, held), self.device, self.processes)
        spent.add("evaluation", once.total * (-(-steps // config.evaluation.every)))
        return self._ended(spent, steps, config.checkpoints.every)

    def supervised(self) -> Spent:
        config = self.config
        if config.kind == "toy_base":
            number, prompt, answer, steps = float(config.steps * config.batch), 9.0, TOY_DOCUMENT - 9.0, config.steps
        else:
            number, prompt, answer = self.counts.documents(config.datasets)
            number = max(1.0, number - config.validation.wanted(int(number)))
            steps = max(1, round(config.epochs * number / config.batch))
        loop = self._loop(supervised_loop(config))
        groups = [(round(prompt), [max(2, round(answer))])] * config.batch
        step = training(self.shape, self.item, groups, loop, self.device, resident=self.place.resident)
        step.add("other", handled(self.device, config.batch, 1))
        return self._ended(step.times(steps), steps, config.checkpoints.every)

    def sampled(self) -> Spent:
        """Evaluation and curation."""
        config = self.config
        source = config.held_out if config.kind == "evaluate_model" else config.problems
        problems = min(self.counts.problems(source), getattr(config, "count", None) or 10**12)
        prompt, mean = self.counts.prompt_tokens(config, source), self.counts.answer_tokens(self.name, config)
        chunk = min(config.chunk, problems)
        groups = dealt(spread_lengths(chunk * config.samples, mean, config.sampling.max_tokens), chunk, prompt)
        spent = sampling(self.shape, self.item, groups, self._sampler(prompt + mean, chunk), self.device, self.processes)
        spent.add("other", handled(self.device, chunk * config.samples, 1))
        spent = spent.times(problems / max(1, chunk))
        spent.add("other", handled(self.device, 0, 0, float(self.shape.parameters * self.item), 1))
        return spent

    def _steps(self) -> int:
        """Of an `rl` stage; those of the stage that it continues are done."""
        before = int(self.config.continues.partition("@")[2]) if self.config.continues else 0
        return max(1, int(self.config.steps) - before)

    def _loop(self, loop: Loop) -> Loop:
        zero = 1 if self.place.resident else loop.zero
        return Loop(**{**vars(loop), "processes": self.processes, "zero": zero, "adapters": _adapters(self.config, self.shape)})

    def _copied(self) -> float:
        return self.device.gpu.bandwidth / 4 if self.device.gpu else 4.0e9

    def _sampler(self, context: float, questions: int) -> Sampler:
        """Replicas: as many as fit on the GPUs, each with as few GPUs as hold the weights."""
        rollout, gpu = self.config.rollout, self.device.gpu
        vllm = rollout.engine == "vllm"
        if gpu is None:
            rows = rollout.tokens / context
            return Sampler(min(self.processes, questions), 1, max(1.0, rows))
        share = WHOLE_SHARE if self.place.resident else (rollout.memory_share or GPU_SHARE)
        width, weights = 1, self.shape.parameters * self.item
        while vllm and weights / width > 0.75 * share * gpu.memory and width < self.processes:
            width *= 2
        room = max(0.05 * share * gpu.memory, share * gpu.memory - weights / width) * width
        rows = min(SEATS * width, room / (context * self.shape.context_bytes(self.item))) if vllm else rollout.tokens / context
        replicas = max(1, min(self.processes // width, questions))
        return Sampler(replicas, width, max(1.0, rows), graph=vllm, speculation=self.place.speculation)

    def _ended(self, spent: Spent, steps: int, every: int) -> Spent:
        """With checkpoints, the model written, and the start."""
        # Processes write their shares side by side: on a GPU's machine one disk for each node's.
        weights, nodes = float(self.shape.parameters), 1
        if self.device.gpu is not None:
            nodes = max(1, self.processes // self.device.gpu.node)
        trained = _adapters(self.config, self.shape) or weights
        checkpoints = max(1, steps // every) * trained * ADAM_BYTES / nodes
        spent.add("other", handled(self.device, 0, 0, checkpoints + 3 * weights * self.item / nodes, 1))
        return spent


def stage_memory(config: Any, model: tuple[Shape, int] | None, place: Place) -> dict[str, Memory]:
    """Memory of one GPU (or process) in a training stage's update, for each ZeRO stage and with offload; else nothing."""
    if model is None or config.kind not in ("rl", "sft", "toy_base"):
        return {}
    shape, item = model
    loop = rl_loop(config) if config.kind == "rl" else supervised_loop(config)
    found = {}
    for zero in range(4):
        for offload in (False, True) if zero >= 2 else (False,):
            other = _beside(config, shape, item, zero, place)
            found[f"zero{zero}{'+offload' if offload else ''}"] = training_memory(
                shape,
                zero=zero,
                processes=place.processes(config),
                item=item,
                micro_tokens=loop.micro_tokens,
                trained=_adapters(config, shape),
                recompute=loop.recompute,
                offload=offload,
                touched_only=place.device.gpu is None,
                other=other,
            )
    return found


def _adapters(config: Any, shape: Shape) -> int | None:
    """Weights of a training stage's adapters; None: it has none. Raises UserError for adapters that its model cannot have."""
    lora = getattr(config, "lora", None)
    return None if lora is None else adapter_weights(shape, lora.rank, lora.targets)


def _beside(config: Any, shape: Shape, item: int, zero: int, place: Place) -> float:
    """Reference, the sampler's copy of the weights, and vLLM's share."""
    if config.kind != "rl":
        return 0.0
    weights = float(shape.parameters * item)
    reference = weights if config.kl > 0 else 0.0
    if config.rollout.engine == "vllm":
        gpu = place.device.gpu
        return reference + (
            0.0 if config.rollout.sleep or gpu is None else (config.rollout.memory_share or GPU_SHARE) * gpu.memory
        )
    # With adapters the compiled decoder of a CPU reads sums of them and the weights (stages/rollout/decoding/compiled.py).
    compiled = config.lora is not None and item == 4 and place.device.gpu is None
    return reference + (weights if zero == 3 or config.one_step_off else 0.0) + (weights if compiled else 0.0)
