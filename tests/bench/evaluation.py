"""Evaluation: our language model for lm-eval against lm-eval's own `hf`, asked the same requests.

First, uncounted, each answers every problem greedily: the texts, and the scores made of them, must be the same.
"""

import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.measure import Bench
from tests.bench.sides import Spec, Turn
from tests.bench.worker import Turns

STOP = ["\n\n", "Question:"]
BATCHES = (8, 16, 32, 64)
"""Batch sizes that lm-eval's `hf` tries on the first requests, to go on with the fastest."""
TRIED = 64
"""Requests in such a try."""


def evaluation(bench: Bench) -> dict[str, Any]:
    """Problems × 4 samples."""
    options = {
        "model": str(bench.model),
        "problems": str(bench.problems),
        "count": bench.extras["eval_problems"] or bench.size(200, 6),
        "samples": bench.size(4, 2),
        "tokens": bench.extras["eval_tokens"] or bench.size(64, 8),
        "batches": bench.extras["hf_batches"] or bench.size(BATCHES, (4, 8)),
    }
    texts = {side: str(bench.out / f"greedy-{side}.json") for side in ("ours", "hf")}

    def found(turns: dict[str, list[Turn]]) -> dict[str, Any]:
        ours, theirs = (json.loads(Path(texts[side]).read_text(encoding="utf-8")) for side in ("ours", "hf"))
        problems = json.loads(bench.problems.read_text(encoding="utf-8"))[: options["count"]]
        same = [a == b for a, b in zip(ours, theirs, strict=True)]
        scores = [[right(text, p["answer"]) for text, p in zip(side, problems, strict=True)] for side in (ours, theirs)]
        return {
            "greedy texts": len(same),
            "greedy texts that are the same": sum(same),
            "greedy score, ours": sum(scores[0]) / len(same),
            "greedy score, hf": sum(scores[1]) / len(same),
            "greedy scores are the same": str(scores[0] == scores[1]).lower(),
        }

    what = f"{options['count']} problems × {options['samples']} samples, at most {options['tokens']} tokens: ours / lm-eval hf"
    ours = Spec("evaluation", "ours", {**options, "texts": texts["ours"]})
    peers = {"lm-eval hf": Spec("evaluation", "hf", {**options, "texts": texts["hf"]})}
    return bench.compare("evaluation", what, ours, peers, found=found)


def right(text: str, answer: str) -> bool:
    """Whether the last number of a text is the reference answer (lm-eval's "flexible extract").

    >>> right("so 3 + 4 = 7. It has 7.", "7"), right("7 or 8", "7")
    (True, False)
    """
    numbers = re.findall(r"-?[0-9][0-9,]*(?:\.[0-9]+)?", text)
    return bool(numbers) and numbers[-1].replace(",", "") == answer.replace(",", "")


def _requests(options: dict[str, Any], *, greedy: bool) -> list[Any]:
    """What lm-eval would ask: one request object per problem, listed as often as it is to be answered."""
    from lm_eval.api.instance import Instance

    problems = json.loads(Path(options["problems"]).read_text(encoding="utf-8"))[: options["count"]]
    how: dict[str, Any] = {"until": STOP, "max_gen_toks": options["tokens"], "do_sample": not greedy}
    how["temperature"] = 0.0 if greedy else 1.0
    samples = 1 if greedy else options["samples"]
    found = []
    for number, problem in enumerate(problems):
        arguments = (f"Question: {problem['question']}\nAnswer:", dict(how))
        found += [Instance("generate_until", dict(problem), arguments, 0, ("bench", number, samples))] * samples
    return found


def _serve(options: dict[str, Any], turns: Turns, answer: Any, tokens_of: Any) -> None:
    """Greedy answers into a file, then the sampled ones, turn by turn."""
    Path(options["texts"]).write_text(json.dumps(answer(_requests(options, greedy=True))), encoding="utf-8")
    requests = _requests(options, greedy=False)

    def work() -> dict[str, Any]:
        texts = answer(requests)
        return {"samples": len(texts), "text_tokens": tokens_of(texts)}

    turns.each(work)


def _ours(options: dict[str, Any], turns: Turns) -> None:
    from stages.evals.lm import RolloutLM
    from stages.rollout.torch_engine import TorchRollout
    from tests.bench.ours import load

    model, tokenizer = load(options["model"])
    seeds = iter(range(10**9))

    def answer(requests: list[Any]) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:  # finished chunks are kept: each turn has its own
            lm = RolloutLM(TorchRollout(model, tokenizer), Path(folder), seed=next(seeds), problems={})
            return lm.generate_until(requests, disable_tqdm=True)

    _serve(options, turns, answer, lambda texts: sum(len(ids) for ids in tokenizer(texts).input_ids))


def _hf(options: dict[str, Any], turns: Turns) -> None:
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=options["model"], device="cpu", dtype="float32", batch_size=1)
    some = _requests(options, greedy=False)[:TRIED]
    tried = {}
    for size in options["batches"]:
        lm.batch_size_per_gpu = size
        started = time.perf_counter()
        lm.generate_until(some, disable_tqdm=True)
        tried[size] = time.perf_counter() - started
    lm.batch_size_per_gpu = min(tried, key=lambda size: tried[size])
    turns.settings = {"batch_size": lm.batch_size, "seconds_by_batch_size": {str(k): round(v, 2) for k, v in tried.items()}}

    def answer(requests: list[Any]) -> list[str]:
        return list(lm.generate_until(requests, disable_tqdm=True))

    _serve(options, turns, answer, lambda texts: sum(len(ids) for ids in lm.tokenizer(texts).input_ids))


SIDES = {"ours": _ours, "hf": _hf}
