"""What a DeepSpeed JSON file means here: its keys checked, "auto" filled in, and what contradicts the stage named.

The stage decides batch, optimizer, schedule, clipping and number format; DeepSpeed keeps ZeRO, offload, communication and
monitoring. Keys of other people's files that say the same as the stage, or `"auto"`, are dropped; those that say otherwise are
an error where they would change the result, and a warning where they have no effect. No torch here: the engine and the checks
before a run use the same functions.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from stages.contract.errors import UserError
from stages.contract.suggest import nearest

AUTO = "auto"
OVERRIDDEN = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("optimizer", "scheduler", "fp16", "bf16", "bfloat16", "amp", "steps_per_print", "zero_allow_untested_optimizer"),
}
"""Top-level keys whose value the stage decides."""
USED = {
    *("zero_optimization", "zero_force_ds_cpu_optimizer", "communication_data_type", "seq_parallel_communication_data_type"),
    *("prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op", "sparse_gradients", "data_types"),
    *("activation_checkpointing", "checkpoint", "aio", "compile", "timers", "comms_logger", "flops_profiler"),
    *("tensorboard", "wandb", "csv_monitor", "comet", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level"),
    *("disable_allgather", "disable_python_gc", "dataloader_drop_last", "use_data_before_expert_parallelism", "nebula"),
    *("torch_autocast", "managed_gradient_accumulation", "vocabulary_size"),
}
"""Top-level keys that DeepSpeed gets as they are."""
SECTIONS = {
    *("optimizer", "scheduler", "fp16", "bf16", "bfloat16", "amp", "torch_autocast", "data_types", "checkpoint", "aio"),
    *("activation_checkpointing", "compile", "timers", "comms_logger", "flops_profiler", "tensorboard", "wandb"),
    *("csv_monitor", "comet", "nebula"),
}
"""Top-level keys whose values are mappings."""
UNSUPPORTED = {
    *("elasticity", "autotuning", "curriculum_learning", "data_efficiency", "progressive_layer_drop", "compression_training"),
    *("pipeline", "hybrid_engine", "tensor_parallel", "expert_parallel", "quantize_training", "weight_quantization"),
    *("eigenvalue", "sparse_attention"),
}
"""Sections that change what is computed, or how the model is spread, in ways that the stages do not know."""
ZERO = {
    *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce"),
    *("allgather_partitions", "allgather_bucket_size", "overlap_comm", "load_from_fp32_weights", "elastic_checkpoint"),
    *("offload_param", "offload_optimizer", "zenflow", "sub_group_size", "cpu_offload_param", "cpu_offload_use_pin_memory"),
    *("cpu_offload", "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold"),
    *("max_live_parameters", "max_reuse_distance", "gather_16bit_weights_on_model_save", "module_granularity_threshold"),
    *("use_all_reduce_for_fetch_params", "allgather_sequential", "stage3_gather_fp16_weights_on_model_save"),
    *("ignore_unused_parameters", "legacy_stage1", "round_robin_gradients", "zero_hpz_partition_size"),
    *("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"),
    *("memory_efficient_linear", "pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings"),
    *("compute_grad_norm", "enable_sanity_checks", "leaf_module", "parameter_alignment"),
    "save_muon_momentum_buffer_in_memory",
    *(
        f"stage3_{name}"
        for name in (
            *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters"),
            *("max_reuse_distance", "gather_16bit_weights_on_model_save", "module_granularity_threshold"),
            *("use_all_reduce_for_fetch_params", "allgather_sequential"),
        )
    ),
}
"""Keys of `zero_optimization`."""
ZERO_SECTIONS = {"offload_param", "offload_optimizer", "zenflow", "leaf_module"}
"""Keys of `zero_optimization` whose values are mappings."""
ZERO_NUMBERS = {
    *("stage", "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "zero_hpz_partition_size"),
    *(
        f"{prefix}{name}"
        for prefix in ("", "stage3_")
        for name in (
            *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters"),
            *("max_reuse_distance", "module_granularity_threshold"),
        )
    ),
}
"""Keys of `zero_optimization` whose values are numbers; those of all others are true or false."""
_ADAM = {"adam", "adamw", "fusedadam", "deepspeedcpuadam"}
_ADAM_EPSILON = 1e-8


@dataclass(frozen=True)
class StageTraining:
    """What the stage decides."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float
    batches: frozenset[int]
    """Texts of a step and of an update, over all ranks."""
    dtype: Literal["float32", "bfloat16"] | None
    """Of the weights; None: not known yet."""
    on_cpu: bool | None
    hidden: int | None
    """Width of the model, from which the transformers integration takes bucket sizes; None: not known yet."""


@dataclass
class Merged:
    """Settings for DeepSpeed."""

    settings: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    """What of the file has no effect."""


def check_keys(settings: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a key that DeepSpeed does not know, with the nearest it does, and for what stages cannot do."""
    for key, value in settings.items():
        if key.startswith(("_", "#", "//")):  # a comment
            continue
        if key in UNSUPPORTED and _enabled(value):
            raise UserError(f"`{key}` is not supported", where=where, mend="remove it: the stage's own settings decide")
        _check_known(key, OVERRIDDEN | USED | UNSUPPORTED, where)
        sections = {"": value, "params": value.get("params")} if isinstance(value, dict) else {"": value}
        for name, section in sections.items():
            if key in SECTIONS and section is not None and not isinstance(section, dict):
                place = ".".join(filter(None, [key, name]))
                raise UserError(f"`{place}` is not a mapping", where=where, mend="see the DeepSpeed documentation")
    for key, value in settings.get("zero_optimization", {}).items():
        _check_known(key, ZERO, f"{where}: zero_optimization")
        _check_zero(key, value, f"{where}: zero_optimization.{key}")


def _check_known(key: str, known: set[str], where: str) -> None:
    if key not in known:
        close = nearest(key, known)
        raise UserError(f"DeepSpeed knows no key `{key}`", where=where, mend=close if "did you mean" in close else "remove it")


def _check_zero(key: str, value: Any, where: str) -> None:
    """Raise UserError for a value of `zero_optimization` of another type than DeepSpeed takes."""
    if value in (None, AUTO):
        return
    if key in ZERO_SECTIONS:
        if not isinstance(value, dict):
            mend = (
                f'for example {{"device": "{value}"}}'
                if value in ("cpu", "nvme", "none")
                else "see the DeepSpeed documentation"
            )
            raise UserError(f"`{value}` is not a mapping", where=where, mend=mend)
    elif key in ZERO_NUMBERS:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"`{value}` is not a number", where=where, mend='write a number without quotes, or "auto"')
    elif not isinstance(value, bool):
        raise UserError(f"`{value}` is neither true nor false", where=where, mend="write true or false without quotes")


def _enabled(section: Any) -> bool:
    return bool(section) and (not isinstance(section, dict) or section.get("enabled", True) not in (False, AUTO))


def batch_sizes(config: Any) -> frozenset[int]:
    """Texts of a step of a training stage, and of one of its updates."""
    if hasattr(config, "questions"):
        whole = int(config.questions * config.samples)
        return frozenset({whole, whole // int(config.minibatches)})
    return frozenset({int(config.batch)} if hasattr(config, "batch") else ())


def stage_training(
    config: Any,
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    on_cpu: bool | None = None,
    hidden: int | None = None,
) -> StageTraining:
    """What a training stage's settings decide."""
    return StageTraining(
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        batches=batch_sizes(config),
        dtype=dtype,
        on_cpu=on_cpu,
        hidden=hidden,
    )


def merge(file: Mapping[str, Any], stage: StageTraining, where: str) -> Merged:
    """The file's settings with "auto" filled in as the transformers integration does, without what the stage decides.

    Raises UserError for what contradicts the stage, or cannot work here. `where` names the file.
    """
    settings = {key: value for key, value in copy.deepcopy(dict(file)).items() if not key.startswith(("_", "#", "//"))}
    merged = Merged(settings)
    _numbers(settings, stage, where)
    merged.warnings += _ignored(settings, stage)
    _optimizer(settings.pop("optimizer", None), stage, f"{where}: optimizer")
    _formats(merged, stage, where)
    zero = settings.get("zero_optimization", {})
    if stage.hidden is not None:
        sizes = {
            "reduce_bucket_size": stage.hidden**2,
            "prefetch_bucket_size": int(0.9 * stage.hidden**2),
            "param_persistence_threshold": 10 * stage.hidden,
        }
        sizes |= {f"stage3_{key}": value for key, value in sizes.items()}
        zero.update({key: value for key, value in sizes.items() if zero.get(key) == AUTO})
    if isinstance(zero.get("offload_optimizer"), dict) and zero["offload_optimizer"].get("device", "none") != "none":
        settings.setdefault("zero_force_ds_cpu_optimizer", False)  # the optimizer is the stage's AdamW
    merged.settings = _without_auto(settings)
    return merged


def _without_auto(value: Any) -> Any:
    """Whatever is still "auto" has DeepSpeed's default."""
    if isinstance(value, dict):
        return {key: _without_auto(item) for key, item in value.items() if item != AUTO}
    return value


def _numbers(settings: dict[str, Any], stage: StageTraining, where: str) -> None:
    batch = settings.pop("train_batch_size", AUTO)
    if batch != AUTO and stage.batches and batch not in stage.batches:
        what = f"`train_batch_size` is {batch}, but a step of the stage has {max(stage.batches)} texts"
        mend = 'remove it or write "auto": `questions` × `samples`, or `batch`, decide'
        raise UserError(what, where=where, mend=mend)
    clip = settings.pop("gradient_clipping", AUTO)
    if clip != AUTO and clip != stage.max_grad_norm:
        what = f"`gradient_clipping` is {clip}, but the stage's `max_grad_norm` is {stage.max_grad_norm:g}"
        raise UserError(what, where=where, mend='remove it or write "auto", and set `max_grad_norm`')


def _ignored(settings: dict[str, Any], stage: StageTraining) -> Iterator[str]:
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if settings.pop(key, AUTO) not in (AUTO, 1):
            yield f"`{key}` has no effect: micro-batches are packed by tokens (`packing.micro_tokens`)"
    if settings.pop("scheduler", None):
        yield "`scheduler` has no effect: the stage's `schedule`, `warmup_steps` and `final_share` decide"
    for key in ("bf16", "bfloat16"):
        enabled = (settings.pop(key, None) or {}).get("enabled", AUTO)
        if enabled != AUTO and stage.dtype is not None and bool(enabled) != (stage.dtype == "bfloat16"):
            value = str(bool(enabled)).lower()
            yield f"`{key}.enabled: {value}` has no effect: the model is {stage.dtype} (`dtype` of its stage)"
    for key in ("steps_per_print", "zero_allow_untested_optimizer"):
        settings.pop(key, None)


def _optimizer(section: Any, stage: StageTraining, where: str) -> None:
    if not section:
        return
    kind = str(section.get("type", "AdamW"))
    if kind.lower() not in {*_ADAM, AUTO}:
        raise UserError(f"`{kind}` is not supported: stages train with AdamW", where=where, mend="remove the section")
    ours = {"lr": stage.lr, "betas": list(stage.betas), "eps": _ADAM_EPSILON, "weight_decay": stage.weight_decay}
    for key, value in (section.get("params") or {}).items():
        if value == AUTO or key not in ours:
            continue
        same = list(value) == ours[key] if isinstance(value, list | tuple) else value == ours[key]
        if not same:
            what = f"`params.{key}` is {value}, but the stage's is {ours[key]}"
            mend = f'write "auto" or remove the section; the stage decides{"" if key == "eps" else f" (`{key}`)"}'
            raise UserError(what, where=where, mend=mend)


def _formats(merged: Merged, stage: StageTraining, where: str) -> None:
    if _enabled_format(merged.settings.pop("fp16", None)):
        place = "does not work on a CPU" if stage.on_cpu else "is not supported"
        mend = "remove the section, or set its `enabled` to false; for 16 bits set `dtype: bfloat16` in the stage `kind: model`"
        raise UserError(f"fp16 {place}", where=f"{where}: fp16", mend=mend)
    if _enabled_format(merged.settings.pop("amp", None)):
        raise UserError("`amp` (Apex) is not supported", where=where, mend="remove the section")
    if _enabled_format(merged.settings.get("torch_autocast")):
        merged.warnings.append("`torch_autocast` computes with other numbers than the sampler: see `mismatch_kl`")


def _enabled_format(section: Any) -> bool:
    return isinstance(section, dict) and section.get("enabled", False) not in (False, AUTO)
