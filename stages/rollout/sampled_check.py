"""Check an engine before a stage samples: log-probabilities of a few sampled tokens against the model's own forward pass.

The fast decoder of the torch engine is replaced by transformers' own (fallback.py) where it differs or fails; an engine that
differs otherwise is refused. Random numbers are derived from a purpose of their own: nothing that the stage samples depends
on the check.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.engine.packing.pack import Packed
from stages.engine.scorer import own_forward_logp, refused
from stages.engine.self_check import FEW, Agree, check_prompts, check_texts, largest_difference, own_logprobs, sampled_length
from stages.engine.windows import check_lengths, computed_limit
from stages.rollout.decoding.decoder import unsupported
from stages.rollout.decoding.transformers_batch import FAILURES
from stages.rollout.protocol import Completion, Request, Rollout, Sampling
from stages.rollout.torch_engine import TorchRollout, load_model, pick_device

PURPOSE = "self-check"
"""Names the check's random numbers."""
FLOOR_VLLM = 1e-3
"""Least tolerance in nats for vLLM, whose kernels sum in another order (measured on a CPU in float32: below 1e-3)."""
COOLEST = 0.5
"""Lowest temperature of a check, as dividing by a small one magnifies rounding; greedy sampling is checked at 1."""


def checked_temperature(temperature: float) -> float:
    """The temperature at which a stage's engine is checked."""
    return max(temperature, COOLEST) if temperature else 1.0


@dataclass(frozen=True)
class SampledCheck:
    """How exactly an engine samples."""

    difference: float
    """Largest difference of a sampled token's log-probability from the model's own, in nats."""
    tolerance: float
    warning: str = ""
    """Why the transformers fallback samples instead of the fast decoder; empty where it does not."""

    @property
    def metrics(self) -> dict[str, float]:
        """For the manifest."""
        return {"check/sampled_logprob_difference": self.difference, "check/sampled_tolerance": self.tolerance}


Own = Callable[[list[Completion]], tuple[list[Tensor], float]]
"""Log-probabilities of each answer's tokens by the model's own forward, and of more behind them; the tolerance in nats."""


def sample_answers(rollout: Rollout, model: Any, prompts: Sequence[Sequence[int]], temperature: float) -> list[Completion]:
    """Two short answers to the first of two `check_prompts`, and one to the second."""
    requests = [
        Request(f"{PURPOSE}-{number}", tuple(prompt), samples)
        for number, (prompt, samples) in enumerate(zip(prompts, (2, 1), strict=True))
    ]
    sampling = Sampling(temperature=temperature, max_tokens=sampled_length(model))
    answers = rollout.sample(requests, sampling, seed=0, purpose=PURPOSE, step=0)
    return [completion for group in answers for completion in group]


def check_sampler(
    rollout: Rollout, model: Any, prompts: Sequence[Sequence[int]], temperature: float, own: Own, agree: Agree = float
) -> SampledCheck:
    """Compare sampled log-probabilities with the model's own; every rank calls it.

    model: the one that `rollout` samples from; prompts: two, by `check_prompts`; agree: the largest of all ranks' differences.
    The torch engine is left with the decoder that agrees. Raises UserError when none does.
    """
    torch_engine = rollout if isinstance(rollout, TorchRollout) else None
    fast, floor = torch_engine is not None and not unsupported(torch_engine.model), 0.0 if torch_engine else FLOOR_VLLM
    reason = ""
    for fallback in (False, True) if fast else (False,):
        if torch_engine and fallback:
            torch_engine.fallback = reason
        answers, failure = _tried(lambda: sample_answers(rollout, model, prompts, temperature))
        # Ranks compute their own forward together, so first they agree whether there is something to compute.
        difference, tolerance = math.inf, floor
        if not agree(float(bool(failure))):
            logps, rounding = own(answers)
            difference, tolerance = agree(_worst(answers, logps)), max(rounding, floor)
        if difference <= tolerance:
            warning = f"{reason}: the transformers fallback samples instead, which is slower" if fallback else ""
            return SampledCheck(difference, tolerance, warning)
        cause = f"is {difference:.2g} nats away from the model's own forward pass (tolerance {tolerance:.2g})"
        way = "the transformers fallback" if fallback else "the fast decoder" if fast else "the engine"
        reason = f"sampling by {way} {cause if math.isfinite(difference) else failure or 'fails on another rank'}"
    raise refused(model, reason)


def check_rollout(rollout: Rollout, prompts: Sequence[str], sampling: Sampling, folder: Path, device: str) -> SampledCheck:
    """Check the engine of a stage that samples and does not train, and that its longest texts fit the model.

    prompts: all of the stage's; folder, device: of the model, which is loaded to be compared with where the engine has it in a
    process of its own.
    Raises UserError when the engine does not sample from the model's own distribution, or texts do not fit.
    """
    model = rollout.model if isinstance(rollout, TorchRollout) else load_model(folder, pick_device(device))
    model.eval()
    check_prompts_fit(model, rollout.encode, prompts, sampling.max_tokens)
    temperature, chosen = (
        checked_temperature(sampling.temperature),
        check_prompts(model, first_prompts(rollout.encode, prompts)),
    )

    def score_own(row: Packed) -> Tensor:
        return own_forward_logp(model, row.to(model.device), temperature)[0].cpu()

    def own(answers: list[Completion]) -> tuple[list[Tensor], float]:
        with torch.inference_mode():
            return own_logprobs(model, score_own, check_texts(model, chosen, [answer.ids for answer in answers]), float)

    return check_sampler(rollout, model, chosen, temperature, own)


_SPECIAL = 8
"""Tokens that a tokenizer may add to a prompt."""


def first_prompts(encode: Callable[[str], Sequence[int]], prompts: Sequence[str]) -> list[Sequence[int]]:
    """Token ids of the first prompts of a stage."""
    return [encode(prompt) for prompt in prompts[:FEW]]


def check_prompts_fit(
    model: Any, encode: Callable[[str], Sequence[int]], prompts: Sequence[str], max_tokens: int, *, trained: bool = False
) -> None:
    """Raise UserError when the longest prompt and its answer do not fit the model's positions; see `check_lengths`.

    Only prompts that may be too long are encoded: a token is at least a byte.
    """
    room = (computed_limit(model) or math.inf) - max_tokens + 1
    lengths = [len(encode(prompt)) for prompt in prompts if len(prompt.encode()) + _SPECIAL > room]
    if lengths:
        check_lengths(model, max(lengths), max_tokens, trained=trained)


def _tried(sample: Callable[[], list[Completion]]) -> tuple[list[Completion], str]:
    """The answers, or why there are none."""
    try:
        return sample(), ""
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        return [], f"fails ({(str(error).strip() or type(error).__name__).splitlines()[0]})"


def _worst(answers: Sequence[Completion], own: Sequence[Tensor]) -> float:
    return max(
        largest_difference(torch.tensor(answer.logprobs), logp[: len(answer.ids)])
        for answer, logp in zip(answers, own, strict=True)
    )
