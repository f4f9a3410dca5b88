"""DeepSpeed JSON files of the user's: "auto" filled in, unknown and contradicting keys named, at load and in the engine."""

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import UserError
from stages.engine.deepspeed_file import (
    OVERRIDDEN,
    UNSUPPORTED,
    USED,
    ZERO,
    ZERO_NUMBERS,
    ZERO_SECTIONS,
    StageTraining,
    batch_sizes,
    check_keys,
    merge,
)
from stages.engine.settings import PRESETS, Training, deepspeed_settings
from stages.recipe.resolve import load_recipe
from stages.rl.settings import GRPO
from stages.supervised.settings import Supervised
from tests.conftest import ROOT

STAGE = StageTraining(
    lr=1e-5,
    betas=(0.9, 0.95),
    weight_decay=0.0,
    max_grad_norm=1.0,
    batches=frozenset({512, 64}),
    dtype="float32",
    on_cpu=True,
    hidden=64,
)
HUGGING_FACE: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "allgather_bucket_size": "auto",
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
"""As in the documentation of the transformers integration."""


def test_merge_fills_auto_as_transformers_does() -> None:
    merged = merge(HUGGING_FACE, STAGE, "ds.json")
    assert merged.settings == {
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 4096,
            "stage3_prefetch_bucket_size": 3686,
            "stage3_param_persistence_threshold": 640,
            "stage3_max_live_parameters": 1e9,
        },
        "wall_clock_breakdown": False,
    }
    assert merged.warnings == []
    assert HUGGING_FACE["zero_optimization"]["reduce_bucket_size"] == "auto"  # the file's own settings are left as they are


def test_merge_leaves_auto_sizes_to_deepspeed_while_the_model_is_unknown() -> None:
    unknown = StageTraining(**{**vars(STAGE), "hidden": None, "dtype": None, "on_cpu": None})
    assert merge(HUGGING_FACE, unknown, "ds.json").settings["zero_optimization"].keys() == {
        "stage",
        "stage3_max_live_parameters",
    }


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.json")))
def test_merge_leaves_the_shipped_settings_as_they_are(name: str) -> None:
    merged = merge(deepspeed_settings(name), STAGE, name)
    assert (merged.settings, merged.warnings) == (deepspeed_settings(name), [])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"fp16": {"enabled": True}}, "fp16: fp16 does not work on a CPU"),
        ({"train_batch_size": 256}, "`train_batch_size` is 256, but a step of the stage has 512 texts"),
        ({"gradient_clipping": 0.5}, "`gradient_clipping` is 0.5, but the stage's `max_grad_norm` is 1"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer: `Lamb` is not supported"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}, "`params.lr` is 0.1, but the stage's is 1e-05"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999]}}}, "`params.betas` is [0.9, 0.999]"),
        ({"amp": {"enabled": True}}, "`amp` (Apex) is not supported"),
    ],
)
def test_merge_refuses_what_contradicts_the_stage(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        merge(settings, STAGE, "ds.json")
    assert says in str(caught.value)
    assert str(caught.value).startswith("ds.json")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}, "`scheduler` has no effect"),
        ({"train_micro_batch_size_per_gpu": 4}, "`train_micro_batch_size_per_gpu` has no effect"),
        ({"gradient_accumulation_steps": 8}, "`gradient_accumulation_steps` has no effect"),
        ({"bf16": {"enabled": True}}, "`bf16.enabled: true` has no effect: the model is float32"),
        ({"torch_autocast": {"enabled": True}}, "`torch_autocast` computes with other numbers"),
    ],
)
def test_merge_names_what_has_no_effect(settings: dict[str, Any], says: str) -> None:
    (warning,) = merge(settings, STAGE, "ds.json").warnings
    assert says in warning


@pytest.mark.parametrize(
    "settings",
    [
        {"train_batch_size": 512},
        {"train_batch_size": 64},
        {"gradient_clipping": 1.0},
        {"optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0}}},
        {"fp16": {"enabled": False}, "bf16": {"enabled": False}},
        {"_comment": "ours", "steps_per_print": 10},
    ],
)
def test_merge_drops_what_says_the_same_as_the_stage(settings: dict[str, Any]) -> None:
    merged = merge(settings, STAGE, "ds.json")
    assert (merged.settings, merged.warnings) == ({}, [])


def test_merge_lets_the_stages_adamw_be_offloaded() -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert merge({"zero_optimization": zero}, STAGE, "ds.json").settings["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"zero_optimisation": {"stage": 2}}, "no key `zero_optimisation`; did you mean `zero_optimization`?"),
        ({"zero_optimization": {"stage": 3, "stage3_prefetch_bucket": 1}}, "did you mean `stage3_prefetch_bucket_size`?"),
        ({"pipeline": {"stages": 2}}, "`pipeline` is not supported"),
        ({"optimizer": "AdamW"}, "`optimizer` is not a mapping"),
        ({"optimizer": {"type": "AdamW", "params": [1]}}, "`optimizer.params` is not a mapping"),
        ({"qqq": 1}, "no key `qqq`; remove it"),
        ({"flops_profiler": True}, "`flops_profiler` is not a mapping"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
            'zero_optimization.offload_optimizer: `cpu` is not a mapping; for example {"device": "cpu"}',
        ),
        (
            {"zero_optimization": {"stage": 3, "sub_group_size": "1e9"}},
            "zero_optimization.sub_group_size: `1e9` is not a number",
        ),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "true"}}, "overlap_comm: `true` is neither true nor false"),
    ],
)
def test_unknown_keys_are_refused_when_the_recipe_is_loaded(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError) as caught:
        load_recipe(ROOT / "configs/quickstart.yaml", [f"stages.zero.deepspeed={file}"])
    assert says in str(caught.value)
    assert str(file) in str(caught.value)


def test_key_twice_is_refused_and_a_byte_order_mark_is_not(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('\ufeff{"zero_optimization": {"stage": 2}}', encoding="utf-8")
    assert deepspeed_settings(str(file)) == {"zero_optimization": {"stage": 2}}
    file.write_text('{"zero_optimization": {"stage": 3}, "zero_optimization": {"stage": 2}}')
    with pytest.raises(UserError, match="the key `zero_optimization` twice in one object"):
        deepspeed_settings(str(file))


def test_sections_that_are_turned_off_are_no_fault() -> None:
    check_keys({"elasticity": {"enabled": False}, "autotuning": {}, "#": "x"}, "ds.json")


def test_batch_sizes_are_those_of_a_step_and_of_an_update() -> None:
    assert batch_sizes(GRPO(questions=8, samples=16, minibatches=4)) == {128, 32}
    assert batch_sizes(Supervised(batch=24)) == {24}
    assert batch_sizes(Training()) == frozenset()


def test_known_keys_are_those_of_the_installed_deepspeed() -> None:
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None and spec.origin is not None
    package = Path(spec.origin).parent
    tree = ast.parse((package / "runtime" / "zero" / "config.py").read_text())
    (section,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "DeepSpeedZeroConfig")
    names = {n.target.id for n in section.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    aliases = {k.value.value for n in ast.walk(section) if isinstance(n, ast.Call) for k in n.keywords if k.arg == "alias"}
    assert names | aliases == ZERO
    fields = [n for n in section.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    kinds = {n.target.id: ast.unparse(n.annotation) for n in fields if isinstance(n.target, ast.Name)}
    assert {name for name, kind in kinds.items() if "Config" in kind} == ZERO_SECTIONS
    assert {name for name, kind in kinds.items() if "int" in kind or "Enum" in kind} == ZERO_NUMBERS & names
    assert {name.removeprefix("stage3_") for name in ZERO_NUMBERS - names} <= ZERO_NUMBERS
    texts = "".join(path.read_text(errors="replace") for path in package.rglob("*.py"))
    for key in OVERRIDDEN | USED | UNSUPPORTED:
        assert f'"{key}"' in texts or f"'{key}'" in texts or f"{key}:" in texts, key


def test_engine_takes_a_file_with_auto_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from stages.engine.deepspeed_engine import Engine
    from stages.engine.scorer import TokenScorer
    from tests.conftest import tiny_llama

    file = tmp_path / "ds.json"
    zero = HUGGING_FACE["zero_optimization"] | {"stage": 2}
    file.write_text(json.dumps(HUGGING_FACE | {"zero_optimization": zero, "scheduler": {"type": "WarmupLR"}}))
    model = tiny_llama().float()
    engine = Engine(TokenScorer(model), Training(), str(file), "cpu")
    assert engine.zero_stage == 2
    assert engine.engine.zero_reduce_bucket_size() == model.config.hidden_size**2
    assert engine.engine.gradient_clipping() == 1.0
    assert f"warning: {file}: `scheduler` has no effect" in capsys.readouterr().err
    for settings, says in (
        ({"fp16": {"enabled": True}}, "fp16 does not work on a CPU"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}}, "offload_optimizer"),
    ):
        file.write_text(json.dumps(settings))
        with pytest.raises(UserError) as caught:
            Engine(TokenScorer(tiny_llama().float()), Training(), str(file), "cpu")
        assert says in str(caught.value)
        assert str(file) in str(caught.value)
