"""vLLM's side of a rollout. Runs under vLLM's own interpreter, so it knows nothing of our packages."""

from typing import Any

from tests.bench.material import questions
from tests.bench.worker import Turns


def _vllm(options: dict[str, Any], turns: Turns) -> None:
    from vllm import LLM, SamplingParams

    engine = LLM(model=options["model"], dtype="float32", enforce_eager=True, max_model_len=2048, seed=0)
    texts = [q for q in questions(options["problems"], options["prompts"]) for _ in range(options["samples"])]
    limits = [
        SamplingParams(temperature=options["temperature"], max_tokens=length, ignore_eos=True) for length in options["lengths"]
    ]
    turns.settings = {"dtype": "float32", "enforce_eager": True}

    def work() -> dict[str, Any]:
        found = engine.generate(texts, limits, use_tqdm=False)
        return {"tokens": sum(len(item.outputs[0].token_ids) for item in found)}

    turns.each(work)


SIDES = {"vllm": _vllm}
