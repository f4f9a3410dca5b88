"""`make bench`: our rollout and update beside the plain ones, alternating in one run, as ratios.

`python -m tests.bench.ratios [--model FOLDER] [--pairs 5]`. Without a folder: the quickstart's model with random weights.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stages.engine.rows import Text, batch_rows, micro_batches, pack_rows, pad_rows
from stages.engine.scorer import TokenScorer
from stages.problems.toy import ToySource, save_toy_tokenizer, toy_problems
from stages.rollout.protocol import Request, Sampling
from stages.rollout.torch_engine import TorchRollout, load_model, load_tokenizer


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(name: str, ours: Callable[[], object], plain: Callable[[], object], pairs: int) -> dict[str, Any]:
    """Run both in turn, after one uncounted pair; the ratio ours / plain pair by pair."""
    ours(), plain()
    measured = [(seconds(ours), seconds(plain)) for _ in range(pairs)]
    ratios = [a / b for a, b in measured]
    found = {"ours / plain": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    print(f"{name:<52} {found['ours / plain']:.2f}  ({found['least']:.2f} to {found['most']:.2f}, {pairs} pairs)")
    return {"comparison": name, **found}


def toy_model(folder: Path) -> tuple[Any, Any]:
    """The quickstart's model with random weights, and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, bos_token_id=None, eos_token_id=1, pad_token_id=0, **shape))
    return model, save_toy_tokenizer(folder)


def main() -> None:
    """Measure and print; JSON on the last line."""
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pair = (load_model(options.model), load_tokenizer(options.model)) if options.model else toy_model(Path(folder))
    model, tokenizer = pair
    engine = TorchRollout(model, tokenizer)
    prompts = [engine.encode(p.question) for p in toy_problems(ToySource(source="toy", count=4))]
    sampling = Sampling(max_tokens=32)
    answers: list[Any] = []

    def our_rollout() -> None:
        requests = [Request(str(i), ids, samples=16) for i, ids in enumerate(prompts)]
        answers[:] = engine.sample(requests, sampling, seed=0, purpose="bench", step=0)

    def plain_rollout() -> None:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts for _ in range(16)])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts for _ in range(16)])
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": 32, "pad_token_id": 0}
        model.eval().generate(ids, attention_mask=mask, **options)

    results = [compare("rollout, 4 prompts x 16: ours / transformers generate", our_rollout, plain_rollout, options.pairs)]
    texts = [Text(ids, c.ids) for ids, group in zip(prompts, answers, strict=True) for c in group]
    scorer = TokenScorer(model)

    def our_update() -> None:
        for rows in micro_batches(pack_rows(texts, 256), 4096):
            scorer(rows)[0].sum().backward()
        model.zero_grad()

    def padded_update() -> None:
        scorer(batch_rows(pad_rows(texts)))[0].sum().backward()
        model.zero_grad()

    results.append(compare("gradient, 64 answers: packed / padded", our_update, padded_update, options.pairs))
    results.append(checkpoints(model, texts, options.pairs))
    print(json.dumps(results))


def checkpoints(model: Any, texts: list[Text], pairs: int) -> dict[str, Any]:
    """Ten optimizer steps with a checkpoint begun after the first, as a stage writes one, and ten without."""
    import tempfile

    from stages.engine.checkpoints import Checkpointer
    from stages.engine.deepspeed_engine import Engine
    from stages.engine.settings import Checkpoints, Optimizer

    engine = Engine(TokenScorer(model), Optimizer(), "zero0", "cpu")

    def steps(checkpointer: Checkpointer | None) -> None:
        for number in range(10):
            for rows in micro_batches(pack_rows(texts, 256), 4096):
                engine.accumulate([lambda rows=rows: -engine.score(rows)[0].mean()])  # type: ignore[misc]
            engine.step(1e-9)
            if checkpointer:
                checkpointer.finish()
                if number == 0:
                    checkpointer.begin(1, {}, {"policy": engine.state()})

    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        kept = Checkpointer(Path(folder), Checkpoints(), 0)
        return compare(
            "ten updates on 64 answers: with / without a checkpoint", lambda: steps(kept), lambda: steps(None), pairs
        )


if __name__ == "__main__":
    main()
