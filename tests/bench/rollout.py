"""Sampling alone: ours against transformers' `generate`, and against vLLM where its interpreter is there."""

from typing import Any

from tests.bench.material import questions
from tests.bench.measure import Bench
from tests.bench.sides import Spec
from tests.bench.worker import Turns

SHORTEST, LONGEST = 16, 256


def rollout_64(bench: Bench) -> dict[str, Any]:
    """8 prompts × 8 samples, all of one length."""
    tokens = bench.size(64, 8)
    prompts, samples = bench.size(8, 2), bench.size(8, 4)
    return _compare(bench, "rollout-64", prompts, samples, [tokens] * (prompts * samples))


def rollout_sure(bench: Bench) -> dict[str, Any]:
    """The same at temperature 0.3, as a policy samples that has grown sure of itself: many answers begin alike."""
    tokens = bench.size(64, 8)
    prompts, samples = bench.size(8, 2), bench.size(8, 4)
    return _compare(bench, "rollout-sure", prompts, samples, [tokens] * (prompts * samples), temperature=0.3)


def rollout_spread(bench: Bench) -> dict[str, Any]:
    """A batch of 16 whose answers have unequal lengths, evenly spread: what an unequal batch costs."""
    prompts, samples = 2, bench.size(8, 4)
    count, shortest, longest = prompts * samples, bench.size(SHORTEST, 2), bench.size(LONGEST, 16)
    lengths = [round(shortest + (longest - shortest) * row / (count - 1)) for row in range(count)]
    # Long and short ones alternate among the prompts, so that no prompt has all long ones.
    return _compare(bench, "rollout-spread", prompts, samples, lengths[::2] + lengths[1::2])


def _compare(
    bench: Bench, name: str, prompts: int, samples: int, lengths: list[int], temperature: float = 1.0
) -> dict[str, Any]:
    options = {
        "temperature": temperature,
        "model": str(bench.model),
        "problems": str(bench.problems),
        "prompts": prompts,
        "samples": samples,
        "lengths": lengths,
    }
    peers = {"transformers generate": Spec("rollout", "generate", options)}
    if bench.extras["vllm_python"].exists():
        python = str(bench.extras["vllm_python"].absolute())  # not resolved: a link into an environment is what makes it one
        # One process, so that its memory is measured; no compiling, which would take minutes for these few tokens.
        variables = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        peers["vLLM"] = Spec("vllm_side", "vllm", options, python=python, variables=variables)
    longest = f"{min(lengths)} to {max(lengths)}" if len(set(lengths)) > 1 else lengths[0]
    what = f"{prompts} prompts × {samples} samples × {longest} tokens, temperature {temperature:g}"
    return bench.compare(name, what, Spec("rollout", "ours", options), peers)


def _ours(options: dict[str, Any], turns: Turns) -> None:
    from tests.bench.ours import endless, load, sample, sample_with_lengths

    model, tokenizer = load(options["model"])
    lengths, samples, number = options["lengths"], options["samples"], iter(range(10**9))
    prompts = [endless(model, tokenizer).encode(q) for q in questions(options["problems"], options["prompts"])]

    def work() -> dict[str, Any]:
        if len(set(lengths)) > 1:
            return {"tokens": sample_with_lengths(model, tokenizer, prompts, samples, lengths, step=next(number))}
        given = {"step": next(number), "temperature": options["temperature"]}
        found = [[c.ids for c in group] for group in sample(endless(model, tokenizer), prompts, samples, lengths[0], **given)]
        begun = {(n, *ids[:end]) for n, group in enumerate(found) for ids in group for end in range(1, len(ids) + 1)}
        return {"tokens": sum(len(ids) for group in found for ids in group), "distinct": len(begun)}

    turns.each(work)


def _generate(options: dict[str, Any], turns: Turns) -> None:
    """One batch, padded on the left; each row is over when it has its length."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options["model"], padding_side="left")
    texts = [q for q in questions(options["problems"], options["prompts"]) for _ in range(options["samples"])]
    batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    width, lengths = batch["input_ids"].shape[1], torch.tensor(options["lengths"])

    class Lengths(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            done: torch.Tensor = input_ids.shape[1] - width >= lengths
            return done

    longest = max(options["lengths"])
    settings: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": options["temperature"]}
    settings |= {"max_new_tokens": longest, "min_new_tokens": longest, "pad_token_id": tokenizer.pad_token_id}
    turns.settings = settings

    def work() -> dict[str, Any]:
        with torch.inference_mode():
            found = model.generate(**batch, **settings, stopping_criteria=StoppingCriteriaList([Lengths()]))
        assert found.shape[1] - width == longest, "an answer has ended too early"
        return {"tokens": int(lengths.sum())}

    turns.each(work)


SIDES = {"ours": _ours, "generate": _generate}
