"""Our own lm-eval task (each problem answered k times, every answer judged) and the run of lm-eval over it."""

import contextlib
import logging
import random
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml
from lm_eval import evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from stages.contract.errors import UserError
from stages.contract.suggest import nearest
from stages.evals.contained_scoring import contain_scoring
from stages.evals.headline import answer_metrics, problem_metrics
from stages.evals.lm import RolloutLM
from stages.evals.settings import EvaluationConfig

TASK_FILE = Path(__file__).parents[2] / "configs" / "evals" / "sampled.yaml"


@dataclass(frozen=True)
class Evaluation:
    """What lm-eval measured."""

    metrics: dict[str, float]
    """Headline numbers of our own task, then `<task>/<metric>` of further tasks."""
    problems: dict[str, dict[str, float]]
    """Problem id -> its means, in the order of the problems."""


class SampledTask(ConfigurableTask):
    """The task of configs/evals/sampled.yaml. Its documents come from memory: nothing is downloaded or cached."""

    def __init__(self, config: dict[str, Any], documents: list[dict[str, str]]) -> None:
        self._documents = documents
        super().__init__(config=config)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:  # noqa: ARG002
        """Give lm-eval the documents."""
        self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_list(self._documents)})


def sampled_task(config: EvaluationConfig, lm: RolloutLM, found: dict[str, dict[str, float]]) -> SampledTask:
    """The task for a stage's settings; `found` receives the numbers of each problem."""
    task = yaml.safe_load(TASK_FILE.read_text(encoding="utf-8"))
    sampling = config.sampling

    def process_results(doc: dict[str, str], results: list[Any]) -> dict[str, float]:  # noqa: ARG001
        # lm-eval has the texts; lengths, ends and verdicts are with what was sampled.
        numbers = problem_metrics(lm.groups[doc["problem_id"]], config.rewards)
        found[doc["problem_id"]] = numbers
        return numbers

    task["repeats"] = config.samples
    task["filter_list"][0]["filter"][0]["k"] = config.samples
    task["generation_kwargs"] = {
        "do_sample": sampling.temperature > 0,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_gen_toks": sampling.max_tokens,
        "until": list(sampling.stop),
    }
    task["process_results"] = process_results
    for exponent in range(1, config.samples.bit_length()):
        task["metric_list"].append({"metric": f"pass_at_{2**exponent}", "aggregation": "mean", "higher_is_better": True})
    render = config.template.render
    documents = [{"problem_id": p.id, "prompt": render(p.question), "answer": p.answer} for p in lm.problems.values()]
    return SampledTask(task, documents)


def run_lm_eval(config: EvaluationConfig, lm: RolloutLM) -> Evaluation:
    """Run our own task, and the further ones, in one call of lm-eval.

    Raises UserError when a further task cannot be loaded, and what the LM raises.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    found: dict[str, dict[str, float]] = {}
    # Indexing lm-eval's own tasks takes 15 s of processor time: only when one is named.
    manager = TaskManager(include_defaults=bool(config.tasks))
    # As lm-eval's `simple_evaluate` does, without its survey of the machine (2 s): some tasks shuffle when they are loaded.
    random.seed(config.seed)
    np.random.seed(config.seed)
    with datasets_cache():
        loaded = with_further([sampled_task(config, lm, found)], config.tasks, config.task_files, manager)
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(config.seed)
        further = [task for task in loaded["tasks"].values() if not isinstance(task, SampledTask)]
        scorers = [contain_scoring(task) for task in further if task.OUTPUT_TYPE == "generate_until"]
        results = evaluate(lm=lm, task_dict=loaded, log_samples=False)["results"]
    mine = results.pop("sampled")
    metrics = {key: mine[f"{key},all"] for key in next(iter(found.values()))}
    if isinstance(error := mine["accuracy_stderr,all"], float):  # "N/A" for a single problem
        metrics["accuracy_stderr"] = error
    metrics |= answer_metrics([lm.groups[problem] for problem in found])
    metrics |= {"problems": float(len(found)), "samples": float(config.samples)}
    unscored = {f"{scorer.task}/unscored": float(scorer.failed) for scorer in scorers if scorer.check()}
    return Evaluation(metrics | renamed(results) | unscored, found)


def renamed(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """lm-eval's `metric,filter` as names MLflow takes, numbers only.

    >>> renamed({"gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.5, "acc_stderr,none": "N/A"}})
    {'gsm8k/exact_match/strict-match': 0.5}
    """
    names = {
        f"{task}/{key.removesuffix(',none').replace(',', '/')}": value
        for task, values in results.items()
        for key, value in values.items()
        if "," in key and isinstance(value, int | float)
    }
    return {re.sub(r"[^\w/. -]", "_", name): float(value) for name, value in names.items()}


def with_further(own: list[SampledTask], tasks: tuple[str, ...], task_files: tuple[str, ...], manager: TaskManager) -> Any:
    """What lm-eval makes of our own task and of further ones.

    Raises UserError when one cannot be loaded.
    """
    for name in tasks:
        if name not in manager.task_index:
            raise UserError(f"lm-eval has no task `{name}`", where="tasks", mend=nearest(name, manager.all_tasks)[:300])
    files = [str(Path(path).absolute()) for path in task_files]
    try:
        return manager.load([*own, *tasks, *files])
    except (OSError, ValueError, KeyError, TypeError, ImportError, yaml.YAMLError) as error:
        key = "tasks" if tasks else "task_files"
        what = f"an lm-eval task cannot be loaded ({type(error).__name__}: {error})"
        raise UserError(what, where=key, mend="check the task's YAML and that its data can be reached") from error


@contextlib.contextmanager
def datasets_cache() -> Iterator[None]:
    """Keep what `datasets` converts for further tasks in a folder that goes away; downloads stay in the hub's cache."""
    before = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory(prefix="r1-datasets-") as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder)
        try:
            yield
        finally:
            datasets.config.HF_DATASETS_CACHE = before
