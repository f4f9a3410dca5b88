"""Recipe files: what YAML makes of a text is what it looks like, or is refused with file, line and hint."""

from pathlib import Path
from typing import Any

import pytest

from stages.contract.errors import UserError
from stages.recipe.resolve import load_recipe
from stages.recipe.yaml_text import read_yaml
from tests.conftest import ROOT

QUICK = ROOT / "configs/quickstart.yaml"


def read(text: str) -> Any:
    return read_yaml(text, "a.yaml", "fix it")


def refused(text: str) -> str:
    with pytest.raises(UserError) as caught:
        read(text)
    return str(caught.value)


def test_key_twice_is_refused_with_both_lines() -> None:
    line = refused("name: x\nstages:\n  zero:\n    lr: 1\n    steps: 2\n    lr: 3\n")
    assert line == "a.yaml: line 6: `stages.zero.lr` is there twice, in lines 4 and 6; remove one of them"


@pytest.mark.parametrize(
    "text",
    [
        "{a: 1, b: 2, a: 3}",
        "a: 1\n'a': 2",  # quoted, the same key
        "x: [{b: 1, b: 2}]",
        "one: &m {q: 1}\ntwo: &n {q: 2}\nx:\n  <<: *m\n  <<: *n\n",
    ],
)
def test_key_twice_is_found_wherever_it_stands(text: str) -> None:
    assert "is there twice" in refused(text)


def test_merge_keys_may_set_a_key_again() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\nd: {<<: [*a, *b], x: 5}\n"
    document = read(text)
    assert document["b"] == {"x": 3, "y": 2}
    assert document["c"] == {"x": 3, "y": 4}
    assert document["d"] == {"x": 5, "y": 2}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("Off", "Off"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("2024-01-02", "2024-01-02"),
        ("2024-13-45", "2024-13-45"),
        ("1e-6", "1e-6"),  # a number to the field that it is for
        ("1.5e-6", 1.5e-6),
        ("1_000", 1000),
        ("0x1F", 31),
        ("0", 0),
        ("0.12", 0.12),
        ("null", None),
        ('"012"', "012"),
        ("'12:30'", "12:30"),
        ("localhost:80", "localhost:80"),
    ],
)
def test_value_is_what_it_looks_like(text: str, value: Any) -> None:
    result = read(f"key: {text}")["key"]
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 012", 'a.yaml: line 2: `012` is an octal number in YAML; write 12 for a decimal number, "012" in quotes'),
        ("a: [0_17]", "`0_17` is an octal number"),
        ("a: 00", "`00` is an octal number in YAML; write 0"),
        ("a: 12:30", 'a.yaml: line 1: `12:30` is a number to base 60 in YAML; write "12:30" in quotes'),
        ("a: 1:30.5", "to base 60"),
        ("a:\n\tb: 1", "a.yaml: line 2: not valid YAML (a tab where a value or key should begin); indent with spaces"),
        ("12: x", 'the key `12` is not read as a name (YAML: int); write "12" in quotes'),
        ("true: x", "the key `true` is not read as a name (YAML: bool)"),
        ("? [a, b]\n: x", "a key is a list or a mapping"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: \0", "not valid YAML (the character U+0000 is not allowed in it)"),
        ("a: \x1b[31m", "not valid YAML (the character U+001B is not allowed in it)"),
    ],
)
def test_value_that_is_not_what_it_looks_like_is_refused(text: str, says: str) -> None:
    assert says in refused(text)


def test_yes_and_no_are_booleans_to_a_boolean_field_and_texts_to_others() -> None:
    stages = load_recipe(QUICK, ["stages.zero.rewards.require_thinking=no", "name=on"])
    assert stages.stages["zero"].rewards.require_thinking is False
    assert stages.name == "on"


def test_exponent_without_point_is_a_number() -> None:
    assert load_recipe(QUICK, ["stages.zero.lr=1e-6"]).stages["zero"].lr == 1e-6


@pytest.mark.parametrize("text", ["﻿{}", "{}"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_byte_order_mark_and_line_ends_change_nothing(tmp_path: Path, text: str, ends: str) -> None:
    lines = [f"extends: {QUICK}", "name: other", "stages:", "  zero:", "    steps: 3", ""]
    (tmp_path / "a.yaml").write_bytes((text[:-2] + ends.join(lines)).encode())
    recipe = load_recipe(tmp_path / "a.yaml")
    assert (recipe.name, recipe.stages["zero"].steps) == ("other", 3)


SMALL = """
name: small
stages:
  base: {kind: toy_base}
  zero: {kind: rl, policy: base, problems: &toy {source: toy, count: 4}, held_out: *toy, sampling: {max_tokens: 8}, steps: 1}
  more: {kind: toy_base, seed: 1}
"""


@pytest.fixture
def above(tmp_path: Path) -> Path:
    (tmp_path / "below.yaml").write_text(SMALL)
    return tmp_path / "above.yaml"


def test_null_stage_leaves_out_an_inherited_one(above: Path) -> None:
    above.write_text("extends: below.yaml\nname: above\nstages: {more: null}\n")
    assert list(load_recipe(above).stages) == ["base", "zero"]
    assert list(load_recipe(above, ["stages.zero=null"]).stages) == ["base"]


def test_null_stage_that_others_need_is_named_with_the_file_that_left_it_out(above: Path) -> None:
    above.write_text("extends: below.yaml\nname: above\nstages:\n  base:\n")
    with pytest.raises(UserError) as caught:
        load_recipe(above)
    says = f"stages.zero.policy: the stage `base` is left out ({above}: stages.base); leave it out here too"
    assert says in str(caught.value)


def test_null_stage_without_an_inherited_one_is_refused(above: Path) -> None:
    above.write_text("extends: below.yaml\nname: above\nstages: {zeor: null}\n")
    with pytest.raises(UserError, match=r"above\.yaml: stages\.zeor: null leaves out an inherited stage, and none is"):
        load_recipe(above)


def test_left_out_stage_can_be_defined_anew_above(above: Path) -> None:
    above.write_text("extends: below.yaml\nname: above\nstages: {more: null}\n")
    top = above.with_name("top.yaml")
    top.write_text("extends: above.yaml\nname: top\nstages: {more: {kind: toy_base, seed: 7}}\n")
    assert load_recipe(top).stages["more"].seed == 7


def test_null_value_says_how_to_leave_a_key_out(above: Path) -> None:
    above.write_text("extends: below.yaml\nname: above\nstages: {zero: {rewards: null}}\n")
    with pytest.raises(UserError, match=r"above\.yaml: stages\.zero\.rewards: .*null is no value here: remove the key"):
        load_recipe(above)


def test_number_where_a_text_is_needed_says_to_quote_it(above: Path) -> None:
    above.write_text("extends: below.yaml\nname: 12\n")
    with pytest.raises(UserError, match=r'name: .*write "12" in quotes'):
        load_recipe(above)


def test_home_is_expanded_in_every_path_of_a_recipe(above: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(above.parent))
    (above.parent / "rows.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    (above.parent / "ds.json").write_text("{}")
    above.write_text("extends: ~/below.yaml\nname: above\nruns: ~/x\ntracking: {uri: 'sqlite:///~/m.db'}\n")
    zero = ["problems={source: file, path: ~/rows.jsonl}", "deepspeed=~/ds.json", "compute.manifest=~/pod.yaml"]
    recipe = load_recipe("~/above.yaml", [f"stages.zero.{text}" for text in zero])
    config = recipe.stages["zero"]
    assert recipe.runs == above.parent / "x"
    assert recipe.tracking.uri == f"sqlite:///{above.parent}/m.db"
    assert recipe.document["runs"] == f"{above.parent}/x"
    assert config.problems.path == f"{above.parent}/rows.jsonl"
    assert config.deepspeed == f"{above.parent}/ds.json"
    assert config.compute.manifest == f"{above.parent}/pod.yaml"


def test_home_that_does_not_exist_is_refused(above: Path) -> None:
    above.write_text("extends: below.yaml\nname: above\nruns: ~nobody-here/x\n")
    with pytest.raises(UserError, match="runs: `~nobody-here` is not a home folder known here"):
        load_recipe(above)


@pytest.mark.parametrize("written", ["$PLACE/x", "${PLACE}/x", "~/$NAME"])
def test_variables_are_expanded_in_paths(above: Path, monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    for name, value in (("PLACE", str(above.parent)), ("HOME", str(above.parent)), ("NAME", "x")):
        monkeypatch.setenv(name, value)
    assert load_recipe(above.with_name("below.yaml"), [f"runs={written}"]).runs == above.parent / "x"


def test_variable_that_is_not_set_is_refused_and_a_folder_of_that_name_is_not(
    above: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_PLACE", raising=False)
    monkeypatch.chdir(above.parent)
    with pytest.raises(UserError, match=r"--set: runs: the variable `\$NO_SUCH_PLACE` is not set"):
        load_recipe(above.with_name("below.yaml"), ["runs=$NO_SUCH_PLACE/x"])
    (above.parent / "$NO_SUCH_PLACE").mkdir()
    assert load_recipe(above.with_name("below.yaml"), ["runs=$NO_SUCH_PLACE"]).runs == above.parent / "$NO_SUCH_PLACE"


@pytest.mark.parametrize("runs", ["s3://bucket/runs", "file:///tmp/runs", '""'])
def test_runs_that_are_no_local_folder_are_refused(above: Path, runs: str) -> None:
    with pytest.raises(UserError, match="--set: runs: should be a folder on this machine"):
        load_recipe(above.with_name("below.yaml"), [f"runs={runs}"])


@pytest.mark.parametrize(("key", "value"), [("steps", "true"), ("lr", "false"), ("rewards.accuracy", "true")])
def test_boolean_for_a_number_is_refused(above: Path, key: str, value: str) -> None:
    with pytest.raises(
        UserError, match=rf"--set: stages\.zero\.{key}: true and false are not numbers \(given: {value.title()}\)"
    ):
        load_recipe(above.with_name("below.yaml"), [f"stages.zero.{key}={value}"])


def test_misspelt_stage_is_named_with_the_nearest(above: Path) -> None:
    with pytest.raises(UserError, match=r"stages\.zreo: a stage needs a kind; did you mean `zero`\?"):
        load_recipe(above.with_name("below.yaml"), ["stages.zreo.lr=1e-5"])


def test_file_in_the_place_of_a_reward_module_says_what_to_write(above: Path) -> None:
    functions = 'stages.zero.rewards.functions.own={function: "./my_rewards.py:own"}'
    with pytest.raises(UserError, match=r"`\./my_rewards\.py` is a file; write `my_rewards:own`, with the module's name"):
        load_recipe(above.with_name("below.yaml"), [functions])
