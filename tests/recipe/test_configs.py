"""Every shipped configuration loads; mistakes in one are told in one line, with the file, the key and the mend."""

import json

import pytest

from stages.contract.config import semantic, stage_inputs
from stages.contract.errors import UserError
from stages.problems.sources import load_problems
from stages.recipe.resolve import load_recipe, recipe_schema
from stages.store.manifest import fingerprint
from tests.conftest import ROOT

PROBLEMS = ["shared.problems={source: toy, count: 5}", "shared.held_out={source: toy, count: 5, split: held_out}"]
SHIPPED = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").glob("*.yaml"))
RECIPES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "configs/recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED + RECIPES)
def test_every_shipped_config_loads(path, tmp_path):
    # A recipe names no model, and shipped problems lie with the user: both are put in here.
    overrides = PROBLEMS if path in RECIPES or "gsm8k" in path or "mawps" in path else []
    if "mawps" in path:
        own = ("stages.evaluation.held_out", "stages.second_test.held_out")
        overrides = [*overrides, *(f"{key}={{source: toy, count: 5, split: held_out}}" for key in own)]
    if path in RECIPES:
        models = ["base", "small_base"] if "full" in path else ["base"]
        overrides = [*overrides, *(f"stages.{name}.path={tmp_path}" for name in models)]
    recipe = load_recipe(ROOT / path, overrides)
    assert {"base", "zero", "evaluation"} <= recipe.stages.keys()
    # The resolved document alone repeats the run.
    (tmp_path / "again.yaml").write_text(json.dumps(recipe.document))
    again = load_recipe(tmp_path / "again.yaml")
    assert again.stages == recipe.stages
    assert again.document == recipe.document


@pytest.mark.parametrize("name", ["smollm2-mawps", "smollm2-reasoning-gym"])
def test_a_real_model_is_chosen_on_validation_and_measured_on_a_test_split(name, tmp_path):
    data = tmp_path / "mawps.jsonl"
    data.write_text("{}")
    mawps = "mawps" in name
    own = ["shared.problems", "shared.held_out", "stages.evaluation.held_out", "stages.second_test.held_out"]
    paths = own if mawps else []
    recipe = load_recipe(ROOT / f"configs/{name}.yaml", [f"{key}.path={data}" for key in paths])
    zero, control, measured = (recipe.stages[n] for n in ("zero", "format_only", "evaluation.zero"))
    assert (control.rewards.accuracy, control.rewards.format) == (0, 1)
    assert control.model_copy(update={"rewards": zero.rewards}) == zero, "the control differs in what is rewarded alone"
    assert len({s.model_dump_json() for s in (zero.problems, zero.held_out, measured.held_out)}) == 3
    second = [recipe.stages["second_test.zero"].held_out] if mawps else []
    assert zero.decontaminate.against == (measured.held_out, *second)
    assert (zero.questions, zero.samples, zero.lr, zero.kl, measured.samples) == (8, 32, 1.5e-5, 0, 4)
    assert len(zero.template.examples) == (5 if mawps else 4) and zero.template.open_thinking
    if mawps:
        cuts = [(s.offset, s.limit) for s in (zero.problems, zero.held_out, measured.held_out)]
        assert cuts == [(0, 331), (331, 40), (371, 160)], "no problem is in two of them"
    else:
        # reasoning-gym makes problem i from seed + i.
        made = [number for s in (zero.problems, zero.held_out, measured.held_out) for number in range(s.seed, s.seed + s.count)]
        assert len(made) == len(set(made)) == 800


@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "qwen2.5-7b-8gpu", "deepseek-v3", "smollm2-gsm8k"])
def test_a_real_models_training_leaves_out_what_its_evaluations_ask(name):
    stages = load_recipe(ROOT / f"configs/{name}.yaml", PROBLEMS).stages
    measured = stages["evaluation.zero"].held_out
    told = [config.decontaminate for config in stages.values() if config.kind in ("rl", "curate")]
    assert len(told) >= 3
    assert all(settings is not None and measured in settings.against for settings in told)


def test_the_full_recipe_has_the_papers_seven_stages():
    recipe = load_recipe(ROOT / "configs/quickstart-full.yaml")
    inputs = {name: set(stage_inputs(config).values()) for name, config in recipe.stages.items()}
    named = {name: {stage for stage, _ in found} for name, found in inputs.items()}
    assert named["rejection_sampling"] == {"base", "reasoning_data", "general_data"}, "the base again"
    assert named["reasoning_data"] == named["general_data"] == {"reasoning"}
    assert named["all_scenarios"] == {"rejection_sampling"}
    assert named["distillation"] == {"small_base", "reasoning_data", "general_data"}
    quick = load_recipe(ROOT / "configs/quickstart.yaml")
    for name in ("base", "zero", "cold_start_data", "cold_start", "reasoning"):
        assert semantic(recipe.stages[name]) == semantic(quick.stages[name]), "done once, it is reused"


def test_the_last_part_of_the_last_rl_differs_by_its_reward_alone(tmp_path):
    """As it stands in the recipe, a comment until one has a reward model."""
    text = (
        (ROOT / "configs/recipes/r1-full.yaml")
        .read_text()
        .replace("extends: r1.yaml", f"extends: {ROOT}/configs/recipes/r1.yaml")
    )
    before, _, rest = text.partition("  #   reward_model: ")
    lines = ("  #   reward_model: " + rest).splitlines()
    count = next(number for number, line in enumerate(lines) if not line.startswith("  #   "))
    given = ["  " + line.removeprefix("  #   ") for line in lines[:count]]
    (tmp_path / "full.yaml").write_text(before + "\n".join([*given, *lines[count:]]))
    settings = [*PROBLEMS, f"stages.base.path={ROOT}", f"stages.small_base.path={ROOT}", "stages.reward_model.hub=some/model"]
    recipe = load_recipe(tmp_path / "full.yaml", settings)
    first, last = recipe.stages["all_scenarios"], recipe.stages["all_scenarios_last"]
    assert (first.steps, last.steps, last.continues) == (1300, 1700, "all_scenarios@1300")
    assert (first.rewards.preference, last.rewards.preference) == (0, 1)
    same = last.model_copy(update={name: getattr(first, name) for name in ("steps", "continues")})
    without = last.rewards.model_copy(update={"preference": 0.0, "preference_model": None})
    assert same.model_copy(update={"rewards": without}) == first


def test_the_recipe_has_the_papers_figures():
    recipe = load_recipe(ROOT / "configs/recipes/r1.yaml", [*PROBLEMS, f"stages.base.path={ROOT}"])
    zero = recipe.stages["zero"]
    assert (zero.lr, zero.kl, zero.samples) == (3e-6, 0.001, 16)
    assert zero.questions * zero.samples == 8192  # outputs of a rollout
    assert zero.questions / zero.minibatches == 32  # questions of an update
    assert zero.steps * zero.minibatches == 10_400  # updates
    assert zero.reference_every * zero.minibatches == 400
    reasoning = recipe.stages["reasoning"]
    assert (reasoning.clip_low, reasoning.clip_high, reasoning.kl) == (10, 10, 0.001)
    assert (zero.sampling.temperature, zero.sampling.max_tokens) == (1.0, 32_768)
    assert (zero.rewards.accuracy, zero.rewards.format, zero.rewards.language) == (1.0, 1.0, 0.0)
    assert recipe.stages["reasoning"].rewards.language == 1.0
    assert recipe.stages["evaluation.zero"].sampling.temperature == 0.6


def test_the_order_follows_the_file_as_far_as_inputs_allow():
    names = list(load_recipe(ROOT / "configs/quickstart.yaml").stages)
    assert names.index("base") < names.index("zero") < names.index("cold_start_data") < names.index("cold_start")
    assert names[-1] == "evaluation"


@pytest.mark.parametrize(
    ("override", "key", "says"),
    [
        ("stages.zero.lrr=1", "stages.zero.lrr", "unknown key `lrr`; did you mean `lr`?"),
        ("stages.zero.rewards.acuracy=1", "stages.zero.rewards.acuracy", "did you mean `accuracy`?"),
        ("stages.zero.problems.cuont=1", "stages.zero.problems.cuont", "did you mean `count`?"),
        ("stages.zero.lr=fast", "stages.zero.lr", "valid number"),
        ("stages.zero.lr=0", "stages.zero.lr", "greater than 0"),
        ("stages.zero.lr=-1", "stages.zero.lr", "greater than 0"),
        ("stages.zero.samples=1", "stages.zero", "samples must be at least 2: grpo compares the answers of a group"),
        ("stages.zero.continues=reasoning", "stages.zero.continues", "should be STAGE@STEP"),
        ("stages.reasoning.continues=zer@3", "stages.reasoning.continues", "did you mean `zero`?"),
        ("stages.reasoning.continues=base@3", "stages.reasoning.continues", "name a stage of kind rl"),
        ("stages.zero.continues=reasoning@3", "stages", "circle"),
        ("stages.zero.algorithm=grop", "stages.zero.algorithm", "did you mean `grpo`?"),
        ("stages.zero.preset=r2", "stages.zero.preset", "'r1' or 'field'"),
        ("stages.zero={algorithm: dapo, preset: r1}", "stages.zero", "with dapo set `preset: null`"),
        ("stages.zero.algorithm=[dapo]", "stages.zero.algorithm", "input should be 'grpo'"),
        ("stages.zero.clip_dual=0.9", "stages.zero.clip_dual", "greater than 1"),
        ("stages.zero={algorithm: cispo, clip_dual: 3}", "stages.zero", "clip_dual has no meaning for cispo"),
        ("stages.zero.critic.lam=0.9", "stages.zero", "`critic` belongs to `algorithm: ppo`"),
        ("stages.zero={algorithm: ppo, critic: {model: shared, pretrain: 2}}", "stages.zero", "critic.model: own"),
        ("stages.zero={algorithm: ppo, critic: {pretrain: 60}}", "stages.zero", "critic.pretrain must be smaller than steps"),
        ("stages.zero={algorithm: ppo, samples: 1, max_resamples: 1}", "stages.zero", "max_resamples needs groups"),
        ("stages.zero={kl_correction: true, kl_place: reward}", "stages.zero", "set `kl_place: loss`"),
        ("stages.zero.rewards.overlong=1", "stages.zero.rewards", "overlong and overlong_buffer go together"),
        ("stages.zero.rewards={overlong: 1, overlong_buffer: 99}", "stages.zero", "not be larger than sampling.max_tokens"),
        ("stages.zero.steps=2.5", "stages.zero.steps", "integer"),
        ("stages.reasoning.deepspeed=zero4", "stages.reasoning.deepspeed", "zero0, zero1, zero2, zero3"),
        ("stages.zero.policy=bas", "stages.zero.policy", "did you mean `base`?"),
        ("stages.zero.policy=cold_start_data", "stages.zero.policy", "gives a dataset, a model is needed"),
        ("stages.zero.kind=rll", "stages.zero.kind", "did you mean `rl`?"),
        ("stages.zero.sampling.top_p=0.9", "stages.zero", "top_p"),
        ("stages.base.kind=model", "stages.base", ""),
        ("shared.tempalte.name=r1_zero", "shared.tempalte", "did you mean `template`?"),
        ("nmae=x", "nmae", "did you mean `name`?"),
        ("stages.zero.policy=reasoning", "stages", "circle"),
        ("stages.zero.compute.processes=0", "stages.zero.compute.processes", "greater than or equal to 1"),
    ],
)
def test_a_mistake_is_told_with_its_key_and_mend(override, key, says):
    with pytest.raises(UserError) as caught:
        load_recipe(ROOT / "configs/quickstart.yaml", [override])
    line = str(caught.value)
    assert key in line
    assert says in line
    assert "\n" not in line


def test_an_algorithm_brings_its_defaults_and_the_recipe_has_the_last_word():
    def zero(*overrides):
        return load_recipe(ROOT / "configs/quickstart.yaml", [f"stages.zero.{o}" for o in overrides]).stages["zero"]

    gspo = zero("algorithm=gspo", "clip_high=0.01")
    assert (gspo.ratio, gspo.aggregation, gspo.clip_low, gspo.clip_high) == ("sequence", "sample_mean", 3e-4, 0.01)
    assert zero("preset=r1").clip_high == 10
    assert zero("algorithm=dapo").max_resamples == 10
    assert (zero("algorithm=ppo").kl_place, zero("algorithm=ppo").kl_estimator) == ("reward", "k1")
    assert zero("algorithm=ppo", "samples=1").samples == 1
    # What was written out whole is read back the same: the defaults are not applied twice.
    again = type(gspo).model_validate(gspo.model_dump(mode="json"))
    assert again == gspo


def test_a_preset_is_its_values():
    named, spelled = (
        load_recipe(ROOT / "configs/quickstart.yaml", overrides).stages["zero"]
        for overrides in (["stages.zero.preset=field"], ["stages.zero.clip_low=0.2", "stages.zero.clip_high=0.28"])
    )
    assert semantic(named) == semantic(spelled)


def test_a_mistake_names_the_file_that_made_it(tmp_path):
    (tmp_path / "below.yaml").write_text(f"extends: {ROOT}/configs/quickstart.yaml\nstages: {{zero: {{lr: -1}}}}\n")
    (tmp_path / "above.yaml").write_text("extends: below.yaml\nname: x\nstages: {zero: {steps: 3}}\n")
    with pytest.raises(UserError, match=r"below\.yaml: stages\.zero\.lr"):
        load_recipe(tmp_path / "above.yaml")


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "name: x\nstages: {}", "extends: missing.yaml", "extends: self.yaml"])
def test_broken_files_are_refused(tmp_path, text):
    (tmp_path / "self.yaml").write_text(text)
    with pytest.raises(UserError, match=r"(self|missing)\.yaml"):
        load_recipe(tmp_path / "self.yaml")


def test_a_section_of_another_kind_replaces_the_one_below():
    recipe = load_recipe(ROOT / "configs/quickstart.yaml", [f"stages.base={{kind: model, path: {ROOT}}}"])
    assert recipe.stages["base"].kind == "model"


def test_a_missing_file_is_named_before_anything_runs():
    with pytest.raises(UserError, match=r"problems\.path: no such file or folder: nowhere\.jsonl"):
        load_recipe(ROOT / "configs/quickstart.yaml", ["shared.problems={source: file, path: nowhere.jsonl}"])


def digest(overrides):
    config = load_recipe(ROOT / "configs/quickstart.yaml", overrides).stages["zero"]
    return fingerprint("rl", 1, semantic(config), {"policy": "x"})


def test_the_fingerprint_sees_what_decides_the_result_and_nothing_else():
    base = digest([])
    for same in (
        "compute.threads=1",
        "compute.processes=2",
        "checkpoints.every=3",
        "deepspeed=zero3",
        "packing.micro_tokens=99",
    ):
        assert digest([f"stages.zero.{same}"]) == base, same
    for other in ("lr=2e-4", "seed=1", "steps=51", "rewards.format=0.2", "problems.count=1999", "sampling.temperature=0.9"):
        assert digest([f"stages.zero.{other}"]) != base, other
    assert digest(["name=other"]) == base


def test_too_many_toy_problems_are_refused():
    source = (
        load_recipe(
            ROOT / "configs/quickstart.yaml",
            ["shared.problems={source: toy, count: 500, operations_min: 1, operations_max: 1}"],
        )
        .stages["zero"]
        .problems
    )
    with pytest.raises(UserError, match="different toy problems"):
        load_problems(source, "problems")


def test_the_schema_knows_every_kind():
    schema = recipe_schema()
    kinds = {
        schema["$defs"][ref["$ref"].rsplit("/", 1)[1]]["properties"]["kind"]["const"]
        for ref in schema["properties"]["stages"]["additionalProperties"]["oneOf"]
        if "$ref" in ref  # null leaves a stage out
    }
    assert {"toy_base", "model", "rl", "curate", "sft", "evaluate", "summary"} <= kinds
    assert "description" in schema["$defs"]["stage_rl"]["properties"]["lr"]


def test_a_mistake_under_shared_is_told_where_it_stands(tmp_path):
    (tmp_path / "x.yaml").write_text(f"extends: {ROOT}/configs/quickstart.yaml\nshared: {{sampling: {{max_tokens: 0}}}}\n")
    with pytest.raises(UserError, match=r"x\.yaml: shared\.sampling\.max_tokens"):
        load_recipe(tmp_path / "x.yaml")


@pytest.mark.parametrize("parents", ["5", "[5]", "{a: b}"])
def test_extends_that_names_no_file(tmp_path, parents):
    (tmp_path / "x.yaml").write_text(f"extends: {parents}\nname: x\n")
    with pytest.raises(UserError, match="neither a file nor a list"):
        load_recipe(tmp_path / "x.yaml")


def test_processes_of_a_stage_that_has_one_are_refused_before_anything_runs():
    with pytest.raises(UserError, match=r"cold_start_data\.compute\.processes: a stage of kind `curate` runs in one process"):
        load_recipe(ROOT / "configs/quickstart.yaml", ["stages.cold_start_data.compute.processes=2"])


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "not readable as JSON"), ("[]", "mapping"), ('{"zero_optimization": {"stage": 4}}', "no ZeRO stage 4")],
)
def test_deepspeed_files_are_checked_before_anything_runs(tmp_path, text, says):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError, match=says):
        load_recipe(ROOT / "configs/quickstart.yaml", [f"stages.zero.deepspeed={tmp_path}/ds.json"])
