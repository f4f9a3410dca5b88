"""The update alone, on recorded answers: ours against one padded row per answer, and against this machine's matrix products."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.material import reward_of
from tests.bench.measure import Bench
from tests.bench.sides import Spec, Turn, once
from tests.bench.worker import Turns

LARGEST_DIFFERENCE = 1e-4
"""Of the gradient from that of padded rows in float64, relative, in any parameter."""


def update(bench: Bench) -> dict[str, Any]:
    """The language model's update of one step."""
    return _compare(bench, "update", bench.model, bench.problems, 2, bench.size(8, 4), bench.size(64, 8))


def update_toy(bench: Bench) -> dict[str, Any]:
    """The quickstart's: a small model, whose update is more than matrix products."""
    return _compare(bench, "update-toy", bench.toy, bench.toy_problems, bench.size(16, 4), bench.size(16, 4), bench.size(32, 8))


def _compare(bench: Bench, name: str, model: Path, problems: Path, count: int, samples: int, tokens: int) -> dict[str, Any]:
    answers = bench.out / f"answers-{name}.json"
    sizes = {"questions": count, "samples": samples, "tokens": tokens}
    options = {"model": str(model), "problems": str(problems), "answers": str(answers), **sizes}
    logs = bench.out / "logs" / name
    once(Spec("material", "answers", options), logs / "answers.log")
    difference = once(Spec("update", "difference", options), logs / "difference.log")["largest"]
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    needed = flops(config, json.loads(answers.read_text(encoding="utf-8")))

    def found(turns: dict[str, list[Turn]]) -> dict[str, Any]:
        shares = [needed / o["seconds"] / p["flops"] for o, p in zip(turns["ours"], turns["peak"], strict=True)]
        return {
            "share of the matrix-product peak": median(shares),
            "least share": min(shares),
            "most share": max(shares),
            "peak GFLOP/s": median(p["flops"] for p in turns["peak"]) / 1e9,
            "needed GFLOP": needed / 1e9,
            "largest relative gradient difference": difference,
            "gradient is exact": str(difference < LARGEST_DIFFERENCE).lower(),
        }

    what = f"forward, backward, AdamW on {count} × {samples} answers of {tokens} tokens: ours / padded rows"
    peers = {"padded rows": Spec("update", "padded", options)}
    beside = {"peak": Spec("measure", "peak")}
    return bench.compare(name, what, Spec("update", "ours", options), peers, beside=beside, found=found)


def flops(config: dict[str, Any], recorded: Sequence[dict[str, Any]]) -> float:
    """Multiplications and additions that the update of a Llama needs, forward (one third) and backward.

    Every prompt once, answers without their last token, which predicts nothing; the head on predicted tokens; attention with
    the keys that each token sees. What an implementation computes besides (padding, anything twice) does not count.
    """
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    keys = config.get("num_key_value_heads") or heads
    layer = hidden * width * (2 * heads + 2 * keys) + 3 * hidden * config["intermediate_size"]
    distinct = seen = predicted = 0
    for item in recorded:
        prompt = len(item["prompt"])
        distinct += prompt
        seen += prompt * (prompt + 1) // 2
        for answer in item["answers"]:
            computed = len(answer["ids"]) - 1
            distinct += computed
            seen += computed * prompt + computed * (computed + 1) // 2
            predicted += computed + 1
    attention = 4 * heads * width * seen  # scores and values, each 2 × width × heads for every token seen
    return float(3 * (layers * (2 * layer * distinct + attention) + 2 * hidden * config["vocab_size"] * predicted))


def _ours(options: dict[str, Any], turns: Turns) -> None:
    from tests.bench.ours import load, policy_of, recorded_groups, train

    groups = recorded_groups(_recorded(options))
    policy, settings = policy_of(load(options["model"])[0])
    tokens, number = _answer_tokens(options), iter(range(10**9))
    turns.settings = settings.packing.model_dump()

    def work() -> dict[str, Any]:
        train(policy, groups, settings, options["tokens"], next(number))
        return {"tokens": tokens}

    turns.each(work)


def _padded(options: dict[str, Any], turns: Turns) -> None:
    """A plain training step: one padded row per answer, logits of all tokens, clip, AdamW. One batch."""
    import torch

    model = _plain(options["model"])
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    recorded, tokens = _recorded(options), _answer_tokens(options)

    def work() -> dict[str, Any]:
        _padded_loss(model, recorded).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        return {"tokens": tokens}

    turns.each(work)


def _difference(options: dict[str, Any], turns: Turns) -> None:
    """The largest relative difference of a parameter's gradient from that of padded rows in float64.

    (Padded rows in float32 are themselves up to 2e-4 from it on SmolLM2-135M.)
    """
    from tests.bench.ours import load, policy_of, recorded_groups, train

    plain = _plain(options["model"]).double()
    policy, settings = policy_of(load(options["model"])[0])
    kept: dict[str, Any] = {}

    def keep(lr: float) -> float:
        kept.update((name, p.grad.double()) for name, p in policy.model.named_parameters())
        return 0.0

    policy.step = keep  # type: ignore[method-assign]

    def work() -> dict[str, Any]:
        train(policy, recorded_groups(_recorded(options)), settings, options["tokens"], 0)
        _padded_loss(plain, _recorded(options)).backward()
        theirs = {name: p.grad.double() for name, p in plain.named_parameters()}
        assert theirs.keys() == kept.keys()
        return {"largest": max(float((kept[n] - g).norm() / g.norm()) for n, g in theirs.items() if float(g.norm()) > 0)}

    turns.each(work)


def _plain(folder: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # no dropout, as in ours
    model.get_input_embeddings().padding_idx = None  # a pad id may be a real token: its row learns, as in ours
    return model


def _padded_loss(model: Any, recorded: Sequence[dict[str, Any]]) -> Any:
    """GRPO's loss on-policy: −Σ A log π / (answers × length)."""
    import torch

    from stages.rl.advantages import group

    rewards = torch.tensor([[reward_of(a["ids"]) for a in item["answers"]] for item in recorded], dtype=torch.float64)
    advantages = group(rewards).flatten().float()
    pairs = [(item["prompt"], answer["ids"]) for item in recorded for answer in item["answers"]]
    width = max(len(prompt) + len(ids) for prompt, ids in pairs)
    tokens = torch.tensor([[*prompt, *ids, *[0] * (width - len(prompt) - len(ids))] for prompt, ids in pairs])
    lengths = torch.tensor([len(prompt) + len(ids) for prompt, ids in pairs])
    places = torch.arange(width)[None]
    starts = torch.tensor([len(prompt) for prompt, _ in pairs])
    answered = (places >= starts[:, None]) & (places < lengths[:, None])
    logits = model(input_ids=tokens, attention_mask=(places < lengths[:, None]).long(), use_cache=False).logits
    logp = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    weights = answered[:, 1:] * (advantages / len(pairs) / (lengths - starts))[:, None]
    return -(weights * logp).sum()


def _recorded(options: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(Path(options["answers"]).read_text(encoding="utf-8"))
    return found


def _answer_tokens(options: dict[str, Any]) -> int:
    return sum(len(answer["ids"]) for item in _recorded(options) for answer in item["answers"])


SIDES = {"ours": _ours, "padded": _padded, "difference": _difference}
