"""What the tests of the pipeline share: the command as a process, a model folder, and programs that stand for stages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, tiny_llama


def environment() -> dict[str, str]:
    """This process's environment without the user's Prefect, MLflow and PostgreSQL, and with the clone importable."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "PG"))}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))}


def r1(*arguments: object, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Run the command and wait for it."""
    command = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment(), check=False)


def refused(*arguments: object) -> str:
    """Run the command, which has to refuse: exit 2, one line, nothing on standard output; returns the line."""
    done = r1(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = {text: i for i, text in enumerate(["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz0123"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<pad>")
    wrapped.save_pretrained(folder)
    tiny_llama().float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One runs folder for all: Prefect and MLflow take their time to make new databases."""
    return tmp_path_factory.mktemp("shared") / "runs"


@pytest.fixture
def recipe(tmp_path: Path, runs: Path, model_folder: Path) -> Path:
    """A recipe of two quick stages."""
    document = {
        "name": "two",
        "runs": str(runs),
        "stages": {
            "base": {"kind": "model", "path": str(model_folder)},
            "other": {"kind": "model", "path": str(model_folder), "seed": 1},
        },
    }
    file = tmp_path / "two.yaml"
    file.write_text(json.dumps(document))  # JSON is YAML
    return file
