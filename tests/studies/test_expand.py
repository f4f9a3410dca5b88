"""A study as a recipe: which arms there are, what they are called, and that an arm of two studies is one computation."""

import pytest
import yaml

from stages.contract.config import semantic, stage_inputs
from stages.contract.errors import UserError
from stages.recipe.resolve import load_recipe, resolve
from tests.conftest import ROOT

STUDIES = sorted((ROOT / "configs/studies").glob("*.yaml"))


def load(tmp_path, study, *overrides, stages=None):
    """A study on the small recipe; its claims may be left out."""
    document = {"extends": str(ROOT / "tests/pipeline/tiny.yaml"), "name": "s", "study": study, "stages": stages or {}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return load_recipe(tmp_path / "s.yaml", list(overrides))


TWO = {"seeds": [0, 3], "variants": {"plain": {}, "ppo": {"algorithm": "ppo", "critic.lam": 0.95}}}
FACTORS = {
    "seeds": [0],
    "factors": {
        "place": {"loss": {"kl_place": "loss"}, "reward": {"kl_place": "reward"}},
        "coefficient": {"low": {"kl": 0.01}, "high": {"kl": 0.1}},
    },
    "claims": {
        "tax": {"says": "x", "metric": "mean_length", "of": {"place": "reward"}, "slope": "kl", "log": True, "below": 0},
        "steeper": {"says": "x", "of": {"place": "reward"}, "slope": "kl", "below": {"place": "loss"}},
        "all": {"says": "x", "of": {}, "slope": "kl", "below": 0},
        "mean": {"says": "x", "of": {"coefficient": ["low", "high"]}, "above": "start"},
        "one": {"says": "x", "of": "loss-low", "above": "reward-low"},
    },
}


def test_every_variant_has_an_arm_for_every_seed_and_each_its_evaluation(tmp_path):
    recipe = load(tmp_path, TWO)
    arms = ["plain-s0", "ppo-s0", "plain-s3", "ppo-s3"]  # seed by seed
    assert list(recipe.stages) == ["base", "base-eval", *(x for arm in arms for x in (arm, f"{arm}-eval")), "study"]
    ppo = recipe.stages["ppo-s3"]
    assert (ppo.algorithm, ppo.critic.lam, ppo.seed, ppo.policy) == ("ppo", 0.95, 3, "base")
    assert recipe.stages["plain-s0"].algorithm == "grpo"
    assert recipe.stages["base"].seed == 0
    measured = recipe.stages["ppo-s3-eval"]
    assert (measured.kind, measured.model, measured.samples, measured.held_out.count) == ("evaluate_model", "ppo-s3", 2, 12)
    inputs = stage_inputs(recipe.stages["study"])
    assert inputs["arms.ppo-s3.trained"] == ("ppo-s3", "model")
    assert inputs["arms.ppo-s3.report"] == ("ppo-s3-eval", "report")
    assert inputs["arms.ppo-s3.start"] == ("base-eval", "report")


def test_the_resolved_document_alone_repeats_the_study(tmp_path):
    recipe = load(tmp_path, FACTORS)
    again = resolve(recipe.document)
    assert again.stages == recipe.stages
    assert again.document == recipe.document
    assert "cold_start" not in again.stages, "what the study does not need is left out"


def test_an_arm_of_two_studies_is_one_computation(tmp_path):
    one = load(tmp_path, TWO)
    other = load(tmp_path, {"seeds": [3], "factors": {"way": {"a": {}, "b": {"algorithm": "ppo", "critic": {"lam": 0.95}}}}})
    assert semantic(one.stages["ppo-s3"]) == semantic(other.stages["b-s3"])
    assert semantic(one.stages["plain-s3"]) == semantic(other.stages["a-s3"]) != semantic(one.stages["plain-s0"])
    quick = load_recipe(ROOT / "tests/pipeline/tiny.yaml")
    assert semantic(one.stages["plain-s0"]) == semantic(quick.stages["zero"]), "the recipe's own run is one, too"
    for name, theirs in (("plain-s0-eval", "evaluation.zero"), ("base-eval", "evaluation.base")):
        assert semantic(one.stages[name]) == semantic(quick.stages[theirs])


def test_factors_are_crossed_and_claims_choose_by_level(tmp_path):
    recipe = load(tmp_path, FACTORS)
    names = [name.removesuffix("-s0") for name in recipe.stages if name.endswith("-s0")]
    assert names == ["loss-low", "loss-high", "reward-low", "reward-high"]
    assert (recipe.stages["reward-low-s0"].kl_place, recipe.stages["reward-low-s0"].kl) == ("reward", 0.01)
    study = recipe.stages["study"]
    assert study.variants["reward-low"] == {"place": "reward", "coefficient": "low"}
    tax, every = study.claims["tax"].of, study.claims["all"].of
    assert tax.blocks == (("reward-low", "reward-high"),)
    assert tax.x == pytest.approx({"reward-low": -2, "reward-high": -1}), "per tenfold"
    assert every.blocks == (("loss-low", "loss-high"), ("reward-low", "reward-high")), "the slope within each place"
    assert study.claims["steeper"].than.x == {"loss-low": 0.01, "loss-high": 0.1}
    assert study.claims["mean"].of.blocks == (("loss-low", "loss-high", "reward-low", "reward-high"),)
    assert (study.claims["mean"].than, study.claims["one"].direction) == ("start", "above")


def test_slopes_are_shown_for_all_combinations_not_for_those_alone_that_claims_name(tmp_path):
    by_log, plain = load(tmp_path, FACTORS).stages["study"].slopes
    both = (("loss-low", "loss-high"), ("reward-low", "reward-high"))
    assert (by_log.against, by_log.log, by_log.blocks) == ("kl", True, both)
    assert by_log.x == pytest.approx({"loss-low": -2, "loss-high": -1, "reward-low": -2, "reward-high": -1})
    assert (plain.log, plain.blocks, plain.x["loss-high"]) == (False, both, 0.1)
    zero = {**FACTORS["factors"], "coefficient": {"none": {"kl": 0}, **FACTORS["factors"]["coefficient"]}}
    claims = {"c": {"says": "x", "of": {"coefficient": ["low", "high"]}, "slope": "kl", "log": True, "above": 0}}
    with_zero = {"seeds": [0], "variants": {"one": {"kl": 0.5}, "two": {"kl": 0.9}}, "factors": zero, "claims": claims}
    (found,) = load(tmp_path, with_zero).stages["study"].slopes
    assert found.blocks == both, "0 has no logarithm; variants that are no combinations have no slope"
    (part,) = load(tmp_path, with_zero, "study.only=[loss-none, loss-low, loss-high, reward-low]").stages["study"].slopes
    assert part.blocks == both[:1]
    assert not load(tmp_path, TWO).stages["study"].slopes


def test_a_slope_against_a_setting_of_a_section(tmp_path):
    lam = {"a": {"critic": {"lam": 0.9}}, "b": {"critic.lam": 1.0}}
    factors = {"lam": lam, "way": {"x": {"algorithm": "ppo"}, "y": {"algorithm": "ppo", "critic.model": "shared"}}}
    claims = {"c": {"says": "x", "of": {}, "slope": "critic.lam", "above": 0}}
    claim = load(tmp_path, {"seeds": [0], "factors": factors, "claims": claims}).stages["study"].claims["c"]
    assert claim.of.blocks == (("a-x", "b-x"), ("a-y", "b-y"))
    assert claim.of.x["a-y"] == 0.9


def test_a_part_of_a_study(tmp_path):
    recipe = load(tmp_path, FACTORS, "study.only=[loss-low, loss-high]", "study.seeds=[7]")
    assert [name for name in recipe.stages if name.endswith("-s7")] == ["loss-low-s7", "loss-high-s7"]
    study = recipe.stages["study"]
    assert set(study.left_out) == {"tax", "steeper", "all", "mean", "one"}
    assert not study.claims


def test_an_evaluation_follows_the_arm_where_it_is_told_to(tmp_path):
    easy = {"source": "toy", "count": 8, "split": "held_out", "operations_min": 1, "operations_max": 1, "seed": 5}
    study = {"seeds": [0], "follow": ["held_out"], "variants": {"a": {}, "b": {"held_out": easy}}}
    recipe = load(tmp_path, study)
    assert (recipe.stages["a-s0-eval"].held_out.count, recipe.stages["b-s0-eval"].held_out.count) == (12, 8)
    arms = recipe.stages["study"].arms
    assert recipe.stages[arms["b-s0"].start].held_out.count == 8, "each is compared with its start on its own problems"
    assert recipe.stages[arms["a-s0"].start].held_out.count == 12


@pytest.mark.parametrize(
    ("change", "where", "says"),
    [
        ("study.stage=zerp", "study.stage", "did you mean `zero`?"),
        ("study.evaluation=zero", "study.evaluation", "not of kind evaluate"),
        ("study.variants={plain: {lrr: 1}}", "stages.plain-s0.lrr", "did you mean `lr`?"),
        ("study.variants={start: {}}", "study.variants", "cannot name a variant"),
        ("study.seeds=[1, 1]", "study", "named twice"),
        ("study.seeds=[]", "study.seeds", "at least 1 item"),
        ("study.only=[plan]", "study.only", "did you mean `plain`?"),
        ("study.claims={c: {says: x, of: plan, above: ppo}}", "study.claims.c.of", "did you mean `plain`?"),
        ("study.claims={c: {says: x, of: plain, above: start, below: 0}}", "study.claims.c", "exactly one of"),
        ("study.claims={c: {says: x, of: plain}}", "study.claims.c", "exactly one of"),
        ("study.claims={c: {says: x, of: [plain, ppo], slope: kl, above: 0}}", "study.claims.c", "have one value of it"),
        (
            "study.claims={c: {says: x, of: [plain, ppo], slope: clip_dual, above: 0}}",
            "study.claims.c",
            "does not say a number",
        ),
        ("study.claims={c: {says: x, of: plain, log: true, above: 0}}", "study.claims.c", "belongs to a `slope`"),
        ("study.claims={c: {says: x, of: {plaice: loss}, above: 0}}", "study.claims.c.of", "no factor `plaice`"),
        ("stages.study={kind: toy_base}", "stages.study", "rename it"),
    ],
)
def test_a_mistake_is_told_with_its_key_and_mend(tmp_path, change, where, says):
    with pytest.raises(UserError) as caught:
        load(tmp_path, TWO, change)
    assert where in str(caught.value)
    assert says in str(caught.value)


def test_a_study_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="study: name `variants`, or `factors`"):
        load(tmp_path, {"seeds": [0]})


def test_two_variants_of_one_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="two variants are called `loss-low`"):
        load(tmp_path, {**FACTORS, "variants": {"loss-low": {}}})


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_shipped_study_expands(path):
    recipe = load_recipe(path)
    study = recipe.stages["study"]
    assert resolve(recipe.document).stages == recipe.stages
    assert {arm.seed for arm in study.arms.values()} == {0, 1, 2, 3, 4}
    assert len(study.arms) == 5 * len(study.variants)
    assert study.claims and not study.left_out
    budgets = {recipe.stages[arm.trained].most_tokens for arm in study.arms.values()}
    assert len(budgets) == 1 and None not in budgets, "the same budget of sampled tokens"
    assert {recipe.stages[arm.trained].select for arm in study.arms.values()} == {"last"}
    for claim in study.claims.values():
        assert claim.of.blocks and all(claim.of.blocks)
