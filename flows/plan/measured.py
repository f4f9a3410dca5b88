"""Finished stages as measurements: what they did, and how long each part of it took, from manifest, journal and rollouts."""

import statistics
from pathlib import Path
from typing import Any

from flows.plan.loops import rl_loop, supervised_loop
from stages.contract.errors import UserError
from stages.costs.amounts import SHARED, Amounts, added
from stages.costs.fit import Measured, Span
from stages.costs.shape import Shape, shape_of
from stages.costs.steps import Groups, rows_in_flight, sample_span, train_spans
from stages.kinds.registry import stage_kind
from stages.runtime.platform import NVIDIA_VERSION
from stages.store.files import read_json
from stages.store.folders import StageFolder
from stages.store.manifest import Manifest, StageRecord, verify_manifest
from stages.tracking.journal import Line, read

KINDS = ("rl", "sft", "toy_base", "evaluate_model", "curate")
"""Kinds whose time is work on a model."""
NVIDIA = NVIDIA_VERSION
"""Where it is, `auto` means a GPU: the fit is of CPUs."""
TOY_LEARNED = 0.75
"""Share of a toy document that is learned, about; its head is too small to matter."""


def measured(folder: StageFolder) -> Measured | None:
    """What a stage's folder tells; None for kinds, or stages, that tell nothing (no manifest, one chunk, another device).

    Raises UserError when the folder is damaged.
    """
    if not folder.manifest.exists() or folder.path.name.split("-")[0] not in KINDS:
        return None
    manifest = verify_manifest(folder)
    record = StageRecord.model_validate(read_json(folder.config))
    config, lines = stage_kind(record.kind).config.model_validate(record.config), read(folder.journal)
    if manifest is None or _on_gpu(config.compute.device) or getattr(config, "lora", None) or not lines:
        return None
    place = {"evaluate_model": "model", "curate": "sampler"}.get(record.kind)
    model = Path(record.inputs[place].path) if place else folder.output("model")
    document = read_json(model / "config.json")
    shape = shape_of(document, str(model / "config.json"))
    item = 4 if document.get("dtype", document.get("torch_dtype")) == "float32" else 2
    stage = _Stage(folder, manifest, record, config, lines, shape, item)
    found = {"rl": stage.rl, "sft": stage.supervised, "toy_base": stage.supervised}.get(record.kind, stage.chunks)()
    if found is None:
        return None
    spans, facts = found
    size = config.compute.processes
    whole = {
        name: Span(seconds=seconds, amounts={k: v * size if k in SHARED else v for k, v in amounts.items()})
        for name, (seconds, amounts) in spans.items()
    }
    return Measured(
        run=folder.path.name, kind=record.kind, parameters=shape.parameters, processes=size, facts=facts, spans=whole
    )


def _on_gpu(device: str) -> bool:
    return device == "cuda" or (device == "auto" and NVIDIA.exists())


Spans = dict[str, tuple[float, Amounts]]


class _Stage:
    """A finished stage, read."""

    def __init__(
        self,
        folder: StageFolder,
        manifest: Manifest,
        record: StageRecord,
        config: Any,
        lines: list[Line],
        shape: Shape,
        item: int,
    ) -> None:
        self.folder, self.manifest, self.record, self.config = folder, manifest, record, config
        self.lines, self.shape, self.item = lines, shape, item

    def rl(self) -> tuple[Spans, dict[str, float]] | None:
        config, size = self.config, self.config.compute.processes
        parts: list[dict[str, Amounts]] = []
        lengths: list[int] = []
        for line in self.lines:
            file = self.folder.rollouts / f"step-{line.step:06d}.parquet"
            if config.rollout.engine != "torch" or config.max_resamples or not file.is_file():
                return None
            groups = _groups(file)
            lengths += [answer for _, answers in groups for answer in answers]
            signal = 1 - line.metrics.get("rollout/zero_variance", 0.0) if config.kl == 0 else 1.0
            alive = groups[: round(len(groups) * signal)]
            mine = groups[::size]
            rows = rows_in_flight(mine, config.rollout.tokens, config.sampling.max_tokens)
            parts.append(
                {
                    **train_spans(self.shape, self.item, alive, rl_loop(config)),
                    "sample": sample_span(self.shape, self.item, mine, rows),
                    "rest": {"answers": float(sum(len(answers) for _, answers in groups)), "steps": 1.0},
                }
            )
        facts = {
            "answers a step": len(lengths) / len(self.lines),
            "mean length": statistics.fmean(lengths),
            "longest": float(max(lengths)),
        }
        loads = 1 + (config.kl > 0)
        return self._spans(parts, loads), facts

    def supervised(self) -> tuple[Spans, dict[str, float]] | None:
        config, learned = self.config, TOY_LEARNED
        if self.record.kind == "sft":
            learned = statistics.fmean(_learned(Path(i.path)) for r, i in self.record.inputs.items() if r.startswith("data"))
        parts = []
        tokens = [line.metrics["time/tokens_per_second"] * line.metrics["time/step"] for line in self.lines]
        for total in tokens:
            length = total / config.batch
            prompt = length * (1 - learned)
            groups = [(round(prompt), [round(length - prompt) + 1])] * config.batch
            spans = train_spans(self.shape, self.item, groups, supervised_loop(config))
            parts.append({**spans, "rest": {"answers": float(config.batch), "steps": 1.0}})
        facts = {"documents a step": float(config.batch), "tokens a step": statistics.fmean(tokens)}
        return self._spans(parts, 0 if self.record.kind == "toy_base" else 1), facts

    def chunks(self) -> tuple[Spans, dict[str, float]] | None:
        """From the second chunk on: what is before the first is in its time."""
        config = self.config
        files = sorted(self.folder.rollouts.glob("chunk-*.parquet"))
        lines = [line for line in self.lines if line.step <= len(files)]
        if config.rollout.engine != "torch" or len(lines) < 2 or len(lines) != len(files) or getattr(config, "tasks", ()):
            return None
        amounts, lengths = [], list[int]()
        for file in files:
            groups = _groups(file)
            lengths += [answer for _, answers in groups for answer in answers]
            rows = rows_in_flight(groups, config.rollout.tokens, config.sampling.max_tokens)
            rest = {"answers": float(sum(len(answers) for _, answers in groups)), "steps": 1.0}
            amounts.append(added(sample_span(self.shape, self.item, groups, rows), rest))
        seconds = (lines[-1].time - lines[0].time) / 1000
        start = added({"starts": 1.0, "stored_bytes": float(self.shape.parameters * self.item)}, amounts[0])
        facts = {"answers a chunk": len(lengths) / len(files), "mean length": statistics.fmean(lengths)}
        facts["longest"] = float(max(lengths))
        spans = {"sample": (seconds, added(*amounts[1:])), "start": (self.manifest.wall_seconds - seconds, start)}
        return spans, facts

    def _spans(self, parts: list[dict[str, Amounts]], loads: int) -> Spans:
        """A training stage's spans: seconds from the journal."""
        total = {name: sum(line.metrics.get(f"time/{name}", 0.0) for line in self.lines) for name in _TIMES}
        seconds = {
            "update": total["forward"] + total["backward"],
            "optimizer": total["optimizer"],
            "sample": total["sample"],
        }
        seconds["rest"] = total["step"] - total["eval"] - sum(seconds.values())
        written = self.shape.parameters * 12.0
        during = (len(self.lines) - 1) // self.config.checkpoints.every
        amounts = {name: added(*(part[name] for part in parts)) for name in parts[0]}
        amounts["rest"] = added(amounts["rest"], {"stored_bytes": during * written})
        # Weights read, the last checkpoint, weights written and digested.
        stored = written + self.shape.parameters * self.item * (loads + 2)
        spans = {name: (seconds[name], amounts[name]) for name in amounts}
        return spans | {"start": (self.manifest.wall_seconds - total["step"], {"starts": 1.0, "stored_bytes": stored})}


_TIMES = ("step", "eval", "forward", "backward", "optimizer", "sample")


def _groups(file: Path) -> Groups:
    """Lengths of prompts and answers of a file of rollouts."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file, columns=["problem_id", "prompt_ids", "completion_ids"])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"the answers cannot be read ({error})", where=str(file), mend="leave this stage out") from error
    found: dict[str, tuple[int, list[int]]] = {}
    lengths = (pc.list_value_length(table[name]).to_pylist() for name in ("prompt_ids", "completion_ids"))
    for problem, prompt, answer in zip(table["problem_id"].to_pylist(), *lengths, strict=True):
        found.setdefault(problem, (prompt, []))[1].append(answer)
    return list(found.values())


def _learned(dataset: Path) -> float:
    """Share of a dataset's text that is learned."""
    import pyarrow.parquet as pq

    table = pq.read_table(dataset / "train.parquet", columns=["prompt", "completion"])
    prompts, completions = (sum(map(len, table[name].to_pylist())) for name in ("prompt", "completion"))
    return float(completions / (prompts + completions))
