"""How time and peak memory of an update grow with its tokens, on a small model with a large vocabulary."""

from statistics import median
from typing import Any

from tests.bench.measure import Bench, exponent, summary
from tests.bench.sides import Spec, Turn, rounds
from tests.bench.worker import Turns

VOCABULARY = 32768
CORNERS = ((8192, 65536), (4096, 16384))
"""Two vocabularies and two numbers of tokens, both of several micro-batches: within one, memory does grow with its tokens."""


def growth(bench: Bench) -> dict[str, Any]:
    """Each size in a process of its own, with a peak of its own."""
    sizes = bench.size((1024, 4096, 16384, 65536), (1024, 2048, 4096))
    vocabularies, tokens = bench.size(CORNERS, ((1024, 4096), (4096, 8192)))
    vocabulary = bench.size(VOCABULARY, 2048)
    points = [_point(bench, vocabulary, size) for size in sizes]
    grid = {(v, t): _point(bench, v, t)["above_mib"] for v in vocabularies for t in tokens}
    (small, large), (few, many) = vocabularies, tokens
    # What is left of the memory when what grows with the vocabulary alone and with the tokens alone is taken away.
    coupled = (grid[large, many] - grid[large, few]) - (grid[small, many] - grid[small, few])
    found = {
        "exponent of time": exponent(sizes, [p["seconds"] for p in points]),
        "exponent of memory": exponent(sizes, [p["above_mib"] for p in points]),
        "MiB more per 1,024 tokens": (points[-1]["above_mib"] - points[-2]["above_mib"]) / (sizes[-1] - sizes[-2]) * 1024,
        "bytes per token × vocabulary entry (logits: 4)": coupled * 2**20 / ((large - small) * (many - few)),
    }
    return {
        "name": "growth",
        "what": f"an update on {sizes[0]:,} to {sizes[-1]:,} packed tokens, vocabulary {vocabulary:,}",
        "points": points,
        "grid": [{"vocabulary": v, "tokens": t, "above_mib": mib} for (v, t), mib in grid.items()],
        "found": found,
    }


def _point(bench: Bench, vocabulary: int, tokens: int) -> dict[str, Any]:
    spec = Spec("growth", "ours", {"vocabulary": vocabulary, "tokens": tokens})
    ready, turns = rounds({"ours": spec}, bench.size(3, 1), bench.out / "logs" / f"growth-{vocabulary}-{tokens}")
    told, measured = summary(ready["ours"], turns["ours"]), turns["ours"]
    return {
        "vocabulary": vocabulary,
        "tokens": measured[0]["distinct"],
        "seconds": median(_seconds(measured)),
        "every_seconds": _seconds(measured),
        "peak_mib": told["peak_mib"],
        "above_mib": told["peak_mib"] - told["resident_mib"],
    }


def _seconds(turns: list[Turn]) -> list[float]:
    return [turn["seconds"] for turn in turns]


def _ours(options: dict[str, Any], turns: Turns) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.bench.ours import policy_of, random_groups, train

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=options["vocabulary"], tie_word_embeddings=True, **ends, **shape)
    policy, settings = policy_of(LlamaForCausalLM(config))
    groups, number = random_groups(options["tokens"], options["vocabulary"]), iter(range(10**9))
    distinct = sum(len(g.episodes[0].prompt_ids) + sum(len(e.completion_ids) - 1 for e in g.episodes) for g in groups)

    def work() -> dict[str, Any]:
        train(policy, groups, settings, 125, next(number))
        return {"distinct": distinct}

    turns.each(work)


SIDES = {"ours": _ours}
