"""The default engine: samples with the model itself, on a CPU or a GPU.

Llama, Qwen2 and Qwen3 are decoded by `decoder.py`, on a CPU in float32 by its compiled form (`compiled.py`); every other causal
model of transformers by its own forward pass (`fallback.py`), which is slower and says so. stages/engine/ARCHITECTURES.md lists
the classes.
"""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.contract.errors import UserError
from stages.engine.adapter_folder import read_adapter
from stages.engine.position_limit import position_limit
from stages.kernels.build import NoCompiler
from stages.rollout.decoding import compiled, fallback
from stages.rollout.decoding.batching import Answer, Flight
from stages.rollout.decoding.decoder import LeanDecoder, unsupported
from stages.rollout.decoding.mode import choose_mode
from stages.rollout.decoding.token_sampling import Choose, choose, uniforms
from stages.rollout.decoding.transformers_batch import Mode
from stages.rollout.protocol import Completion, Done, Request, Sampling
from stages.rollout.settings import Decoder, RolloutSettings
from stages.rollout.token_text import TokenText, end_tokens

TAIL = 24
"""Tokens looked back over for a stop text, at least: one for each of its bytes, since a token may be a single one."""


class TorchRollout:
    """Samples from a transformers model. Implements `stages.rollout.protocol.Rollout`."""

    def __init__(self, model: Any, tokenizer: Any, tokens: int | None = None, decoder: Decoder = "auto") -> None:
        """`tokens`: most tokens whose keys and values are held at once; it bounds memory and hardly changes the answers.

        decoder: see RolloutSettings.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.tokens = tokens or RolloutSettings().tokens
        self.decoder = decoder
        self.end_tokens = end_tokens(model, tokenizer)
        self.text = TokenText(tokenizer, self.end_tokens)
        self.fallback = "rollout.decoder is `transformers`" if decoder == "transformers" else ""
        """Why the model's own forward samples where a faster decoder could; empty where the fastest does."""
        self._mode: Mode | None = None

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Token ids of a prompt."""
        return tuple(self.text.prompt(prompt))

    def sample(
        self, requests: list[Request], sampling: Sampling, *, seed: int, purpose: str, step: int, done: Done | None = None
    ) -> list[list[Completion]]:
        """Answer every request; see the protocol."""
        for request in requests:
            if not request.prompt_ids:
                raise UserError(f"the prompt of `{request.key}` is empty", where="template", mend="write a template")
        longest = max((len(r.prompt_ids) for r in requests), default=0) + sampling.max_tokens
        limit = position_limit(self.model)
        if requests and limit is not None and longest - 1 > limit:  # the last token is not read
            name, prompt = type(self.model).__name__, longest - sampling.max_tokens
            what = f"`{name}` reads {limit} tokens at most, not a prompt of {prompt} with {sampling.max_tokens} more"
            raise UserError(what, where="sampling.max_tokens", mend="make it smaller, or take a model with more positions")
        answers = [
            [
                Answer(
                    request.prompt_ids,
                    uniforms(self._limit(request, number, sampling), seed, purpose, step, request.key, number),
                )
                for number in range(request.first_sample, request.first_sample + request.samples)
            ]
            for request in requests
        ]
        # Prompts of like length fly together, the longest first.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids))
        queue = [answer for i in order for answer in answers[i]]
        found: list[list[Completion]] = [[] for _ in requests]
        of_request = {id(answer): i for i, group in enumerate(answers) for answer in group}
        left = [len(group) for group in answers]

        def over(answer: Answer) -> None:
            number = of_request[id(answer)]
            left[number] -= 1
            if not left[number]:
                found[number] = self._completions(answers[number])
                if done is not None:
                    done(number, found[number])

        was_training = self.model.training
        self.model.eval()  # dropout off while sampling
        try:
            with torch.inference_mode():
                if reason := self.fallback or unsupported(self.model):
                    mode = self._mode = self._mode or choose_mode(self.model, limit)
                    warnings.warn(f"sampling takes the slow path: {reason}; it runs {mode}", stacklevel=2)
                    pick: Choose = partial(choose, temperature=sampling.temperature, top_p=sampling.top_p)
                    fallback.decode(self.model, queue, pick, self._ender(sampling), over, budget=self.tokens, mode=mode)
                else:
                    decoder = self._decoder(longest)
                    pick = decoder.chooser(sampling.temperature, sampling.top_p)
                    Flight(decoder, queue, pick, self._ender(sampling), over, budget=self.tokens).run()
        finally:
            self.model.train(was_training)
        return found

    def _decoder(self, longest: int) -> LeanDecoder:
        """The fastest decoder of those that the setting allows."""
        reason = compiled.unsupported(self.model)
        if self.decoder != "torch" and not reason:
            try:
                return compiled.CompiledDecoder(self.model, longest)
            except NoCompiler as error:
                reason = str(error)
                if self.decoder == "auto":
                    mend = "install one (Debian: g++), or say so with rollout.decoder=torch"
                    warnings.warn(f"the decoding step is not compiled, so sampling is slower: {reason}; {mend}", stacklevel=3)
        if self.decoder == "compiled":
            raise UserError(f"the decoding step cannot be compiled: {reason}", where="rollout.decoder", mend="use `auto`")
        return LeanDecoder(self.model, longest)

    def _completions(self, answers: list[Answer]) -> list[Completion]:
        return [
            Completion(answer.ids, answer.logprobs, self.text.decode(answer.ids), "stop" if answer.stopped else "length")
            for answer in answers
        ]

    def _limit(self, request: Request, number: int, sampling: Sampling) -> int:  # noqa: ARG002  one for all here
        """Most tokens of a request's sample of that number."""
        return sampling.max_tokens

    def _ender(self, sampling: Sampling) -> Any:
        """Says of rows of tokens, and how many each has, which have come to an end."""
        ends = torch.tensor(sorted(self.end_tokens), dtype=torch.long, device=next(self.model.parameters()).device)
        finishing = Finishing(self.text, sampling.stop)
        tail = max([TAIL, *(len(text.encode(errors="surrogatepass")) + 1 for text in sampling.stop)])

        def ended(ids: Tensor, counts: Tensor) -> Tensor:
            newest = ids.gather(1, counts[:, None] - 1).squeeze(1)
            over = torch.isin(newest, ends)
            # To decode every row at every token took two fifths of the time of a GPU.
            if rows := [row for row, token in enumerate(newest.tolist()) if finishing[token]] if sampling.stop else []:
                lengths, found = counts[rows].tolist(), ids[rows].tolist()
                texts = [self.text.decode(row[max(0, n - tail) : n]) for row, n in zip(found, lengths, strict=True)]
                over[rows] |= torch.tensor([any(stop in text for stop in sampling.stop) for text in texts], device=over.device)
            return over

        return ended


class Finishing(dict[int, bool]):
    """Whether a token may be the last of a stop text: its own text has the last character of one, or is half a character."""

    def __init__(self, text: TokenText, stop: tuple[str, ...]) -> None:
        super().__init__()
        self._text, self._last = text, {text[-1] for text in stop if text} | {"\N{REPLACEMENT CHARACTER}"}
        self._any = any(text[-1:].isspace() or not text for text in stop)  # some tokenizers strip a lone token's spaces

    def __missing__(self, token: int) -> bool:
        text = self._text.decode([token])
        found = self[token] = self._any or not self._last.isdisjoint(text)
        return found


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises UserError when the folder has none.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError("the model folder has no tokenizer", where=str(folder), mend="add tokenizer files") from error


def load_model(folder: Path, device: str = "cpu", dtype: str = "auto") -> Any:
    """The causal language model of a folder (safetensors, nothing executed from it), with its adapters in place if it has any.

    Raises UserError when the folder has another kind of model, or an adapter that cannot be read.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):  # they would silently be random
        what = f"its weights lack `{missing[0]}`: not a language model"
        raise UserError(what, where=str(folder), mend="name a stage or folder that has one")
    read_adapter(model, folder)
    return model.to(device)


def pick_device(device: str) -> str:
    """`auto` becomes `cuda` when PyTorch sees it, else `cpu`."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def load_rollout(folder: Path, device: str, settings: RolloutSettings) -> TorchRollout:
    """An engine that samples from a model folder."""
    model, tokenizer = load_model(folder, pick_device(device)), load_tokenizer(folder)
    return TorchRollout(model, tokenizer, settings.tokens, settings.decoder)
