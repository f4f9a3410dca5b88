"""What all tests share: a tiny model with random weights, and where real problems may lie."""

import json
import os
import shutil
from pathlib import Path

import pytest

from stages.runtime.platform import usable_cores
from tests.requirements import pytest_sessionfinish, pytest_terminal_summary  # noqa: F401 - hooks

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
# Tests run in a worker per core and more: several threads each would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
OF_RANKS = ("GLOO_", "NCCL_", "LOCAL_RANK")
"""Variables that a test whose own process is a rank (`ranks.join`) sets there."""
_GIVEN = frozenset(os.environ)

LONGEST_FIRST = (
    "untrusted/test_total.py",  # an hour of the slow ones
    "pipeline/test_whole_run.py",
    "rl/test_zero.py",
    "cli/test_command.py",
    "deployments/test_schedule.py",
    "pipeline/test_user_environment.py",
    "rl/test_resume.py",
    "supervised/test_resume.py",
    "doctor/test_mistakes.py",
    "engine/test_adapters.py",
    "rollout/test_compiled.py",
    "architectures/test_sweep.py",
)
"""Files that the workers begin with: one that began a long file last would go on alone while the other has nothing left."""


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores, for tests also wait: for servers, time-outs, other processes. Each takes up to 2 GB."""
    return min(usable_cores() + 1, 8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files of `LONGEST_FIRST` to the front; the order within a file and of the others stays.

    Raises UsageError where importing a module has made this process a rank.
    """
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))

    joined = sorted(name for name in os.environ.keys() - _GIVEN if name.startswith(OF_RANKS))
    if joined:
        raise pytest.UsageError(f"a test module sets {', '.join(joined)} when it is imported: join the ranks in a fixture")


@pytest.fixture(scope="session")
def root() -> Path:
    """The clone."""
    return ROOT


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables and no rows, to be copied."""
    from stages.store.empty_databases import make, place

    database = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    return database if place("mlflow", database) else make("mlflow", database.parent)


def tiny_llama(seed: int = 0, vocabulary: int = 32, *, tied: bool = False):
    """A random Llama of about 10 k parameters, in float64, with logits far from uniform."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


def group_of(number, prompt, completions, rewards, *, logprobs=None, verdicts=None, finishes=None):
    """A scored group with the given tokens and rewards."""
    from stages.problems.episode import Episode, Group, Problem, Reward

    problem = Problem(id=f"p{number}", question=f"q{number}", answer="a", source="s")
    group = Group(problem)
    for sample, (completion, reward) in enumerate(zip(completions, rewards, strict=True)):
        group.episodes.append(
            Episode(
                problem=problem,
                sample=sample,
                prompt="",
                prompt_ids=list(prompt),
                completion_ids=list(completion),
                logprobs=list(logprobs[sample]) if logprobs else [-1.0] * len(completion),
                text="",
                finish=finishes[sample] if finishes else "stop",
                reward=Reward(total=reward, parts={}, verdict=verdicts[sample] if verdicts else "right"),
            )
        )
    return group


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
def runs(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> Path:
    """One runs folder for all: Prefect and MLflow take their time to make new databases."""
    folder = tmp_path_factory.mktemp("shared") / "runs"
    folder.mkdir()
    shutil.copy(mlflow_database, folder)
    return folder


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
