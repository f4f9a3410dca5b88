"""The default engine: samples with the model's own forward pass and a key-value cache, on a CPU or a GPU.

Each distinct prompt is prefilled once and its cache repeated for its samples; finished rows leave the batch. Works for every
causal model of transformers.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.rollout.protocol import Completion, Request, Sampling
from stages.rollout.sampling import draw, nucleus, uniforms
from stages.store import heartbeat
from stages.store.errors import UserError

ROWS = 256
"""Answers decoded at once."""
TAIL = 24
"""Tokens looked back over for a stop text."""


class TorchRollout:
    """Samples from a transformers model. Implements `stages.rollout.protocol.Rollout`."""

    def __init__(self, model: Any, tokenizer: Any, rows: int = ROWS) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.rows = rows
        self.end_tokens = end_tokens(model, tokenizer)

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Token ids of a prompt."""
        return tuple(self.tokenizer(prompt).input_ids)

    def sample(
        self, requests: list[Request], sampling: Sampling, *, seed: int, purpose: str, step: int
    ) -> list[list[Completion]]:
        """Answer every request; see the protocol."""
        for request in requests:
            if not request.prompt_ids:
                raise UserError(f"the prompt of `{request.key}` is empty", where="template", mend="write a template")
        answers: list[list[Completion]] = [[] for _ in requests]
        was_training = self.model.training
        self.model.eval()  # dropout off while sampling
        with torch.inference_mode():
            for batch in self._batches(requests):
                numbers = [
                    uniforms(sampling.max_tokens, seed, purpose, step, requests[i].key, sample) for i, samples in batch
                    for sample in samples
                ]  # fmt: skip
                prompts = [(requests[i].prompt_ids, len(samples)) for i, samples in batch]
                done = iter(self._decode(prompts, torch.stack(numbers), sampling))
                for i, samples in batch:
                    answers[i].extend(next(done) for _ in samples)
        self.model.train(was_training)
        return answers

    def _batches(self, requests: list[Request]) -> list[list[tuple[int, range]]]:
        """Cut the samples of the requests into batches of at most `rows`, requests of like length together."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids))
        batches: list[list[tuple[int, range]]] = []
        room = 0
        for index in order:
            start, end = requests[index].first_sample, requests[index].first_sample + requests[index].samples
            while start < end:
                if room == 0:
                    batches.append([])
                    room = self.rows
                taken = min(room, end - start)
                batches[-1].append((index, range(start, start + taken)))
                start, room = start + taken, room - taken
        # Answers come back in the order of their sample numbers, because a request's samples fill batches in order.
        return batches

    def _decode(self, prompts: list[tuple[tuple[int, ...], int]], numbers: Tensor, sampling: Sampling) -> list[Completion]:
        device = next(self.model.parameters()).device
        numbers = numbers.to(device)
        repeats = torch.tensor([count for _, count in prompts], device=device)
        width = max(len(ids) for ids, _ in prompts)
        tokens = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids, _ in prompts], device=device)  # (P, width)
        lengths = torch.tensor([len(ids) for ids, _ in prompts], device=device)
        mask = (torch.arange(width, device=device)[None] >= width - lengths[:, None]).long()
        output = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        which = torch.repeat_interleave(torch.arange(len(prompts), device=device), repeats)  # (R,)
        cache = output.past_key_values
        cache.batch_select_indices(which)
        logits, mask, positions = output.logits[which, -1], mask[which], lengths[which]

        completions = [Completion() for _ in range(len(which))]
        alive = list(range(len(which)))  # row of the batch -> completion; a finished row may stay for a while
        for t in range(sampling.max_tokens):
            heartbeat.progress()
            chosen, logp = self._choose(logits.float(), numbers[alive, t], sampling)
            going = [completion for row in alive if (completion := completions[row]).finish != "stop"]
            for row, token, value in zip(alive, chosen.tolist(), logp.tolist(), strict=True):
                if completions[row].finish != "stop":
                    completions[row].ids.append(token)
                    completions[row].logprobs.append(value)
            for completion, over in zip(going, self._ended(going, sampling), strict=True):
                completion.finish = "stop" if over else "length"
            keep = [i for i, row in enumerate(alive) if completions[row].finish != "stop"]
            if not keep or t + 1 == sampling.max_tokens:
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
            # Leaving costs a copy of the cache, so rows leave once an eighth of the batch has ended.
            if len(keep) * 8 <= len(alive) * 7:
                index = torch.tensor(keep, device=device)
                cache.batch_select_indices(index)
                chosen, mask, positions = chosen[index], mask[index], positions[index]
                alive = [alive[i] for i in keep]
            output = self.model(
                input_ids=chosen[:, None],
                attention_mask=mask,
                position_ids=positions[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            logits, positions = output.logits[:, -1], positions + 1
        texts = self.tokenizer.batch_decode([c.ids for c in completions], skip_special_tokens=True)
        for completion, text in zip(completions, texts, strict=True):
            completion.text = text
        return completions

    def _choose(self, logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """Next tokens and their log-probabilities. logits: (R, V) float32; uniform: (R,)."""
        if sampling.temperature == 0:
            logp = torch.log_softmax(logits, dim=-1)
            chosen = logp.argmax(-1)
        else:
            logp = torch.log_softmax(logits / sampling.temperature, dim=-1)
            probabilities = logp.exp()
            if sampling.top_p < 1:
                probabilities = nucleus(probabilities, sampling.top_p)
            chosen = draw(probabilities, uniform)
        return chosen, logp.gather(-1, chosen[:, None]).squeeze(-1)

    def _ended(self, completions: list[Completion], sampling: Sampling) -> list[bool]:
        ended = [c.ids[-1] in self.end_tokens for c in completions]
        if sampling.stop:
            tails = self.tokenizer.batch_decode([c.ids[-TAIL:] for c in completions], skip_special_tokens=True)
            ended = [over or any(text in tail for text in sampling.stop) for over, tail in zip(ended, tails, strict=True)]
        return ended


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every declared end token: of the generation config, the model config and the tokenizer."""
    declared = (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id)
    found: set[int] = set()
    for item in declared:
        found.update(item if isinstance(item, list) else [] if item is None else [item])
    return frozenset(found)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises UserError when the folder has none.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError("the model folder has no tokenizer", where=str(folder), mend="add tokenizer files") from error


def load_model(folder: Path, device: str = "cpu", dtype: str = "auto") -> Any:
    """The causal language model of a folder (safetensors, nothing executed from it)."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    return model.to(device)


def pick_device(device: str) -> str:
    """`auto` becomes `cuda` when PyTorch sees it, else `cpu`."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def load_rollout(folder: Path, device: str) -> TorchRollout:
    """An engine that samples from a model folder."""
    return TorchRollout(load_model(folder, pick_device(device)), load_tokenizer(folder))
