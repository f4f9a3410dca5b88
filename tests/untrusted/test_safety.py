"""Audits of the source, and what a hostile model folder can do: nothing."""

import ast
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.contract.errors import UserError
from stages.kinds.model import KIND, ModelConfig
from stages.store.folders import StageFolder
from stages.store.stage import StageContext, StopRequest
from tests.conftest import ROOT
from tests.doubles.hub_server import Hub
from tests.stage_process import environment, prepare

SOURCES = sorted(path for room in ("flows", "stages") for path in (ROOT / room).rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}


def calls(*names, trees=None):
    """`file:line` and the call, for every call of a function or method of one of these names."""
    for path, tree in (trees or TREES).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if called in names:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def given(node, name):
    """What a call gives for a keyword; None when it gives nothing."""
    return next((k.value.value for k in node.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def test_no_model_s_code_is_run():
    found = [
        (where, node) for where, node in calls("from_pretrained", "from_config") if "GenerationConfig" not in ast.unparse(node)
    ]
    assert len(found) >= 8
    for where, node in found:
        spread = any(k.arg is None for k in node.keywords)  # `**options`, which has it
        assert spread or given(node, "trust_remote_code") is False or "from_config" in ast.unparse(node.func), where
    text = "".join(path.read_text() for path in SOURCES)
    assert not re.search(r"trust_remote_code[\"']?\s*[:=]\s*True", text)


def test_weights_are_read_from_safetensors_alone():
    models = [(w, n) for w, n in calls("from_pretrained") if re.search("AutoModel|_model_class", ast.unparse(n.func))]
    assert len(models) >= 4
    for where, node in models:
        assert given(node, "use_safetensors") is True, where


def test_nothing_is_unpickled():
    texts = {path: path.read_text() for path in (ROOT / "tests").rglob("*.py") if path.name != "test_safety.py"}
    tests = {path: ast.parse(text) for path, text in texts.items() if "load(" in text}
    for where, node in calls("load", trees=TREES | tests):
        if ast.unparse(node.func) == "torch.load":
            assert given(node, "weights_only") is True, where
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "shelve", "dill", "joblib", "cloudpickle"} & set(names), path
    for where, node in calls("load", "load_all", "unsafe_load", "full_load"):
        assert not ast.unparse(node.func).startswith("yaml."), where  # `yaml.safe_load` only
    assert "allow_pickle=True" not in "".join(path.read_text() for path in SOURCES)


def test_nothing_listens_beyond_loopback():
    """But for what the user asks for with `r1 up --host`, which wants credentials (test_servers.py)."""
    asked = ("flows/servers/access.py",)
    for path in SOURCES:
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and not str(path).endswith(asked):
                assert node.value not in ("0.0.0.0", "::"), f"{path}:{node.lineno}"
    for where, node in calls("bind", "create_server"):
        known = re.search(r"127\.0\.0\.1|LOOPBACK", ast.unparse(node))
        assert known or ("flows/servers/server_process.py" in str(where) and ast.unparse(node) == "probe.bind(place)"), where


@pytest.fixture
def folder(model_folder, tmp_path):
    """A model folder to spoil."""
    return Path(shutil.copytree(model_folder, tmp_path / "given"))


def made(folder, tmp_path):
    place = StageFolder(tmp_path / "stage")
    place.path.mkdir(exist_ok=True)
    KIND.run(StageContext(ModelConfig(kind="model", path=str(folder)), place, {}, {}, StopRequest()))
    return place.output("model")


class Evil:
    """What runs when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (self.mark, "w")


def test_pickled_weights_are_refused_in_one_line(folder, tmp_path):
    mark = tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    torch.save(Evil(str(mark)), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no weights in safetensors; convert its \*\.bin weights") as caught:
        made(folder, tmp_path)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_pickled_weights_beside_others_are_not_read_and_not_handed_on(folder, tmp_path):
    mark = tmp_path / "ran"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(str(mark))))
    output = made(folder, tmp_path)
    assert not mark.exists()
    assert sorted(path.suffix for path in output.iterdir() if path.suffix not in (".json", ".jinja")) == [".safetensors"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../elsewhere/model.safetensors"])
def test_an_index_names_safetensors_beside_it(folder, tmp_path, name):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(UserError, match="no safetensors file beside it"):
        made(folder, tmp_path)


def test_an_adapter_has_no_base_model_loaded_from_elsewhere(folder, tmp_path):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/else"}))
    with pytest.raises(UserError, match="an adapter"):
        made(folder, tmp_path)


@pytest.mark.parametrize("known", [True, False])
def test_code_in_a_model_folder_is_not_run(folder, tmp_path, known):
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w')\nclass A:\n    pass\n"
    (folder / "modeling_evil.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    config["auto_map"] = dict.fromkeys(names, "modeling_evil.A")
    if not known:
        config["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(config))
    if known:
        made(folder, tmp_path)
    else:
        with pytest.raises(UserError, match="the model cannot be loaded"):
            made(folder, tmp_path)
    assert not mark.exists()


@pytest.mark.slow
@pytest.mark.parametrize("safe", [True, False])
def test_of_a_hub_s_model_neither_code_nor_pickles_are_even_fetched(folder, tmp_path, safe):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(str(tmp_path / "ran"))))
    (folder / "modeling_evil.py").write_text("raise SystemExit('code of the hub')")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.A"}
    (folder / "config.json").write_text(json.dumps(config))
    if not safe:
        (folder / "model.safetensors").unlink()
    with Hub(folder) as hub:
        place = prepare(tmp_path / "stage", ModelConfig(kind="model", hub="them/theirs"), {})
        variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-m", "stages", str(place)],
            env={**environment(), **variables},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    asked = " ".join(hub.asked)
    assert "config.json" in asked
    assert not re.search(r"\.bin|\.py|discussions|convert", asked), asked
    assert not (tmp_path / "ran").exists()
    if safe:
        assert done.returncode == 0, done.stderr[-3000:]
        assert (place / "model" / "model.safetensors").is_file()
    else:
        assert done.returncode == 2, done.stderr[-3000:]
        assert "safetensors" in done.stderr.strip().splitlines()[-1]
