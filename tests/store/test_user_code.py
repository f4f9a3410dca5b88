"""Modules and settings files of the user's: where they are searched, which files count, what of them the fingerprint sees."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from stages.contract.config import Execution, ExternalFile, StageConfig, field_marker, semantic
from stages.contract.errors import UserError
from stages.evals.settings import EvaluationConfig
from stages.kinds.registry import MODULES, stage_kind
from stages.recipe.explain import models_in
from stages.recipe.resolve import load_recipe
from stages.rewards.verifier_pool.pool import Limits, Pool
from stages.store.manifest import InputRecord, fingerprint
from stages.store.user_code import child_environment, module_files, use_code_folders
from stages.store.user_files import changed_files, check_user_files, user_file_inputs
from tests.conftest import ROOT

QUICK = ROOT / "configs/quickstart.yaml"
ROLE = "rewards.functions.brevity.function"


def write(folder: Path, **files: str) -> Path:
    """Modules by name; `__` stands for a folder."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return write(
        tmp_path / "project",
        mine="import json\nfrom pkg import deep\nfrom pkg.sub import word\ndef brevity(a):\n    import late\n    return 1\n",
        late="import importlib\nlater = importlib.import_module('latest')\n",
        latest="X = 1\n",
        pkg__deep="from . import beside\nfrom .sub import word as w\n",
        pkg__beside="",
        pkg__sub__word="from ..beside import *\n",
        stranger="",
    )


def names(module: str, *folders: Path) -> set[str]:
    return set(module_files(module, [str(folder) for folder in folders]))


def test_module_files_follow_imports_of_every_form_and_leave_out_what_is_not_imported(project: Path) -> None:
    (project / "pkg" / "__init__.py").write_text("")
    expected = {"mine", "pkg", "pkg.deep", "pkg.beside", "pkg.sub.word", "late", "latest"}
    assert names("mine", project) == expected
    (project / "pkg" / "__init__.py").unlink()  # a folder is a package too
    assert names("mine", project) == expected - {"pkg"}


def test_module_files_search_the_recipes_folder_before_the_working_folder(project: Path, tmp_path: Path) -> None:
    work = write(tmp_path / "work", mine="import other\n", other="")
    assert names("mine", project, work) == names("mine", project)
    assert names("mine", work, project) == {"mine", "other"}


def test_module_of_an_installed_package_has_no_files_of_the_users(tmp_path: Path) -> None:
    assert module_files("json.decoder", [str(tmp_path)]) == {}
    assert module_files("stages.rewards.tags", [str(ROOT)]) == {}


def test_missing_module_is_refused_with_the_folders_that_were_searched(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        module_files("absent", [str(tmp_path), "/nowhere/at/all"], where="stages.zero")
    says = (
        f"stages.zero: there is no module `absent` in {tmp_path}, /nowhere/at/all (no such folder here), nor an installed one"
    )
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize("name", ["datasets", "code", "sys"])
def test_module_hidden_by_an_installed_one_is_refused_where_it_is_imported_or_named(tmp_path: Path, name: str) -> None:
    write(tmp_path, mine=f"import {name}\n", **{name: "def f(a): return 1\n"})
    for module in ("mine", name):
        with pytest.raises(UserError, match=rf"{name}\.py is hidden by the installed module .*; give `{name}` another name"):
            module_files(module, [str(tmp_path)])


def test_package_called_datasets_that_nobody_imports_is_no_matter(tmp_path: Path) -> None:
    write(tmp_path, mine="X = 1\n", datasets____init__="raise RuntimeError\n")
    assert names("mine", tmp_path) == {"mine"}


def test_folder_of_data_called_datasets_does_not_count_as_a_package(tmp_path: Path) -> None:
    write(tmp_path, mine="import datasets\n")
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "train.jsonl").write_text("{}\n")
    assert names("mine", tmp_path) == {"mine"}


@pytest.mark.parametrize("text", ["def f(:\n", "x = '\n", "\0", "(" * 5000])
def test_file_that_is_not_python_is_refused_by_name(tmp_path: Path, text: str) -> None:
    write(tmp_path, mine="import broken\n", broken=text)
    with pytest.raises(UserError, match=r"broken\.py"):
        module_files("mine", [str(tmp_path)])


def test_code_folders_come_last_in_processes_that_run_user_code(tmp_path: Path) -> None:
    """A child as the launchers start it, from a folder with a `datasets` package, which PYTHONPATH has too."""
    write(tmp_path, datasets____init__="MINE = True\n", mine="X = 1\n", stages____init__="raise RuntimeError\n")
    program = (
        "from stages.store.user_code import use_code_folders\n"
        f"use_code_folders([{str(tmp_path)!r}])\n"
        "import sys, datasets, mine\n"
        "assert not hasattr(datasets, 'MINE')\n"
        f"assert sys.path[-1] == {str(tmp_path)!r}, sys.path\n"
    )
    paths = os.pathsep.join(["", str(tmp_path), str(ROOT)])
    variables = child_environment({**os.environ, "PYTHONPATH": paths})
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_use_code_folders_moves_what_pythonpath_has_in_front(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), "/other"]))
    monkeypatch.setattr(sys, "path", [str(tmp_path), "/other", str(ROOT), "/lib/site-packages"])
    monkeypatch.setenv("R1_CODE_FOLDERS", "[]")
    use_code_folders([str(tmp_path), "/recipe"])
    assert sys.path == ["/other", "/lib/site-packages", str(ROOT), str(tmp_path), "/recipe"]
    assert json.loads(os.environ["R1_CODE_FOLDERS"]) == [str(tmp_path), "/recipe"]


def test_pool_imports_a_function_from_its_folders_and_refuses_a_hidden_one(tmp_path: Path) -> None:
    write(tmp_path, mine="import helper\ndef f(x): return x + helper.Y\n", helper="Y = 3\n", datasets="def f(x): return x\n")
    limits = Limits(5.0, 30.0)
    pool = Pool("mine:f", limits, 1, folders=[str(tmp_path)])
    hidden = Pool("datasets:f", limits, 1, folders=[str(tmp_path)])
    try:
        assert pool.ask([[4]])[0].value == 7
        with pytest.raises(UserError, match=r"datasets\.py is hidden by the installed module"):
            hidden.ask([[4]])
    finally:
        for worker in (*pool.workers, *hidden.workers):
            worker.end()


def zero(folder: Path, *overrides: str) -> StageConfig:
    (folder / "r.yaml").write_text(f"extends: {QUICK}\nname: mine\n")
    return load_recipe(folder / "r.yaml", [f"stages.zero.{text}" for text in overrides]).stages["zero"]


def rewarded(folder: Path) -> StageConfig:
    return zero(folder, "rewards.functions={brevity: {function: 'mine:brevity'}}")


def digest(config: StageConfig, folder: Path) -> str:
    inputs = user_file_inputs(config, [str(folder)])
    return fingerprint("rl", 1, semantic(config), {role: item.digest for role, item in inputs.items()})


def test_stage_without_user_files_has_no_more_in_its_fingerprint_than_before() -> None:
    for config in load_recipe(QUICK, ["shared.deepspeed=zero2", "stages.base.optimizer=adamw"]).stages.values():
        assert user_file_inputs(config, ["/nowhere"]) == {}


@pytest.mark.parametrize("changed", ["mine", "pkg/deep", "pkg/sub/word", "late", "latest"])
def test_fingerprint_sees_a_change_in_every_file_that_the_reward_imports(project: Path, changed: str) -> None:
    config = rewarded(project)
    before, inputs = digest(config, project), user_file_inputs(config, [str(project)])
    with (project / f"{changed}.py").open("a") as file:
        file.write("Z = 1\n")
    assert digest(config, project) != before
    assert changed_files(inputs[ROLE], user_file_inputs(config, [str(project)])[ROLE]) == [f"{changed}.py"]


def test_fingerprint_sees_which_function_of_a_module_rewards(project: Path) -> None:
    other = zero(project, "rewards.functions={brevity: {function: 'mine:other'}}")
    assert digest(other, project) != digest(rewarded(project), project)


def test_fingerprint_sees_neither_other_files_nor_the_folder(project: Path, tmp_path: Path) -> None:
    config = rewarded(project)
    before = digest(config, project)
    (project / "stranger.py").write_text("import datasets\n")
    (project / "r.yaml").touch()
    assert digest(config, project) == before
    moved = project.rename(tmp_path / "moved")
    assert digest(config, moved) == before


def test_deepspeed_file_of_the_users_counts_by_its_content_alone(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"gradient_clipping": 1.0}')
    (tmp_path / "b.json").write_text('{"gradient_clipping": 1.0}')
    a, b, preset = (zero(tmp_path, f"deepspeed={name}") for name in (tmp_path / "a.json", tmp_path / "b.json", "zero3"))
    before = digest(a, tmp_path)
    assert digest(b, tmp_path) == before
    assert digest(preset, tmp_path) != before
    (tmp_path / "a.json").write_text('{"gradient_clipping": 2.0}')
    assert digest(a, tmp_path) != before


TASK = """
task: mine
include: base.yaml
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
process_docs: !function steps.process
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    write(tmp_path, steps="import helper\ndef process(docs): return docs\n", helper="", aside="")
    (tmp_path / "base.yaml").write_text("include: lower.yaml\noutput_type: generate_until\n")
    (tmp_path / "lower.yaml").write_text("dataset_path: json\n")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "task.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    return tmp_path


def evaluated(folder: Path, **more: Any) -> InputRecord:
    toy = {"source": "toy", "count": 4}
    config = EvaluationConfig(kind="evaluate", held_out=toy, task_files=[str(folder / "task.yaml")], **more)  # type: ignore[arg-type]
    return user_file_inputs(config, [str(folder)])["task_files.0"]


@pytest.mark.parametrize("changed", ["task.yaml", "base.yaml", "lower.yaml", "steps.py", "helper.py", "rows.jsonl"])
def test_lm_eval_task_counts_with_what_it_includes_calls_and_reads(task: Path, changed: str) -> None:
    before = evaluated(task)
    with (task / changed).open("a") as file:
        file.write("\n")
    after = evaluated(task)
    assert after.digest != before.digest
    assert [Path(name).name for name in changed_files(before, after)] == [changed]


def test_lm_eval_task_of_one_file_has_the_digest_of_its_content(task: Path) -> None:
    (task / "task.yaml").write_text("task: mine\ndataset_path: json\n")
    assert evaluated(task).digest == hashlib.sha256(b"task: mine\ndataset_path: json\n").hexdigest()


def test_lm_eval_include_that_is_missing_is_refused(task: Path) -> None:
    (task / "lower.yaml").unlink()
    with pytest.raises(UserError, match=r"base\.yaml: includes `lower\.yaml`, which is no file"):
        evaluated(task)


def test_other_code_on_this_machine_than_the_stage_was_prepared_with_is_refused(project: Path) -> None:
    config = rewarded(project)
    folders = [str(project)]
    inputs = user_file_inputs(config, folders)
    check_user_files(config, inputs, folders)
    (project / "latest.py").write_text("X = 2\n")
    with pytest.raises(UserError, match=rf"{ROLE}.*: latest\.py is not what the stage was prepared with; copy the same files"):
        check_user_files(config, inputs, folders)
    (project / "mine.py").unlink()
    with pytest.raises(UserError, match="there is no module `mine`"):
        check_user_files(config, inputs, folders)


def unmarked_fields(model: type[BaseModel], where: str) -> set[str]:
    """Fields named like files that are neither inputs by content nor execution."""
    names: set[str] = set()
    for name, field in model.model_fields.items():
        marker = field_marker(model, name)
        if isinstance(marker, Execution | ExternalFile):
            continue
        if any(part in name for part in ("path", "file", "folder", "gguf", "template_", "manifest", "python", "deepspeed")):
            names.add(f"{where}.{name}")
        for below in models_in(field.annotation):
            names |= unmarked_fields(below, f"{where}.{name}")
    return names


def test_every_field_that_names_a_file_counts_by_content_or_is_execution() -> None:
    unmarked = set().union(*(unmarked_fields(stage_kind(kind).config, kind) for kind in MODULES))
    assert unmarked == {"model.gguf_package"}  # the name of an installed package
