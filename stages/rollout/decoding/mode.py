"""Chooses how a transformers model is decoded: by trying each mode against the model's own forward on each text alone.

Which modes are right is declared nowhere: some models take padding into their state, some caches cannot be cut, some models
hand none on. So a few tokens are decoded in each mode, from the fastest on, and the first is taken whose log-probabilities
are those of the model's own forward.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from stages.contract.errors import UserError
from stages.rollout.decoding.transformers_batch import MODES, Mode, TransformersBatch, UnsupportedByModel, own_logits

PROMPT_LENGTHS = (24, 3)
"""Tokens of the probe's two prompts: one is longer than the kernels of convolutions, one shorter."""
CONTINUATION = 8
"""Tokens behind a prompt."""
LEAVES_AT = 4
"""Tokens of the continuation after which the first sequence leaves its batch."""
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Largest difference of a log-probability over the vocabulary, in nats."""
TOLERANCE_16_BIT = 0.05
"""The same where weights have 16 bits, of the mean over the vocabulary: their rounding alone makes single ones differ more."""
NOISE = 4
"""A mode may differ from the model's own forward by this many times what that differs from itself on a text's beginning."""
CAUSAL = {torch.float64: 1e-4, torch.float32: 1e-2}
"""Most nats by which later tokens may change earlier log-probabilities by rounding (SmolLM2-135M: 4e-5; BERT: 1.7)."""
CAUSAL_16_BIT = 0.5
"""The same in 16 bits, of the mean."""


def choose_mode(model: Any, limit: int | None = None, modes: Sequence[Mode] = MODES) -> Mode:
    """The first mode in which a model's log-probabilities are those of its own forward.

    Raises UserError when the model's forward cannot read a text, is not causal, or agrees with no mode.

    Args:
        model: a causal language model in evaluation mode.
        limit: most tokens that it can read; see `position_limit`.
        modes: those to try, the fastest first.

    """
    with torch.inference_mode():
        return _Probe(model, limit).choose(modes)


class _Probe:
    """Three texts over two prompts, and the log-probabilities of the model's own forward on each alone."""

    def __init__(self, model: Any, limit: int | None) -> None:
        self._model, self._name = model, type(model).__name__
        self._dtype = next(model.parameters()).dtype
        self._device = next(model.parameters()).device
        self._prompts, self._continuations = _texts(model, limit)
        base, noise = TOLERANCES.get(self._dtype, TOLERANCE_16_BIT), 0.0
        self._expected = []
        for prompt, continuation in zip([*self._prompts[:1], *self._prompts], self._continuations, strict=True):
            full = self._own((*prompt, *continuation))
            self._expected.append(full[len(prompt) - 1 : -1])
            noise = max(noise, self._distance(self._own((*prompt, *continuation[:-2])), full[:-2]))
        if noise > CAUSAL.get(self._dtype, CAUSAL_16_BIT):
            raise _refusal(
                f"`{self._name}` is not causal: later tokens change the log-probabilities of earlier ones by {noise:.2g} nats"
            )
        self._tolerance = max(base, NOISE * noise)

    def choose(self, modes: Sequence[Mode]) -> Mode:
        """See `choose_mode`."""
        closest, reason = float("inf"), "no mode was tried"
        for mode in modes:
            try:
                difference = self._difference(mode)
            except UnsupportedByModel as error:
                reason = str(error)
                continue
            if difference <= self._tolerance:
                return mode
            closest = min(closest, difference)
        if closest < float("inf"):
            raise _refusal(f"log-probabilities sampled from `{self._name}` differ from its own forward by {closest:.2g} nats")
        raise _refusal(f"`{self._name}` cannot be sampled: {reason}")

    def _own(self, ids: Sequence[int]) -> Tensor:
        """(T, V) log-probabilities by the model's own forward."""
        try:
            logits = own_logits(self._model, torch.tensor([ids], device=self._device))
        except UnsupportedByModel as error:
            raise _refusal(f"`{self._name}` cannot read a text alone: {error}") from error
        if logits.shape[:2] != (1, len(ids)):
            raise _refusal(f"`{self._name}` has logits of shape {tuple(logits.shape)} for a text of {len(ids)} tokens")
        return logits[0].float().log_softmax(-1) if self._dtype != torch.float64 else logits[0].log_softmax(-1)

    def _difference(self, mode: Mode) -> float:
        """How far the log-probabilities of a mode are from the model's own, in nats."""
        batches = [[0, 1, 2]] if mode.padded else [[0, 1], [2]]
        return max(
            self._distance(logits.log_softmax(-1), self._expected[text][at])
            for batch in batches
            for text, at, logits in self._decode(batch, mode)
        )

    def _decode(self, texts: list[int], mode: Mode) -> Iterator[tuple[int, int, Tensor]]:
        """Decode some of the texts side by side: number of the text, index in its continuation, (V,) logits there."""
        prompts = [self._prompts[number] for number in sorted({max(0, text - 1) for text in texts})]
        first = max(0, texts[0] - 1)
        batch = TransformersBatch(self._model, prompts, [max(0, text - 1) - first for text in texts], mode)
        for at in range(len(self._continuations[0])):
            if at == LEAVES_AT and len(texts) > 1 and batch.can_drop:
                texts = texts[1:]
                batch.keep(torch.arange(1, len(texts) + 1, device=self._device))
            for row, text in enumerate(texts):
                logits = batch.logits[row]
                yield text, at, logits if self._dtype == torch.float64 else logits.float()
            if at + 1 < len(self._continuations[0]):
                batch.append(torch.tensor([self._continuations[text][at] for text in texts], device=self._device))

    def _distance(self, one: Tensor, other: Tensor) -> float:
        """Nats between two arrays of log-probabilities; infinite where either is not a number."""
        difference = (one - other).abs().nan_to_num(nan=torch.inf)
        return float(difference.amax() if self._dtype in TOLERANCES else difference.mean())


def _texts(model: Any, limit: int | None) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Two prompts and three continuations (two of the first prompt), of tokens of the model's own vocabulary.

    The pad token is among them: a model may sample it, and some models then count positions in another way.
    """
    config = model.config.get_text_config(decoder=True)
    vocabulary, pad = config.vocab_size, getattr(config, "pad_token_id", None)
    tokens = torch.randint(vocabulary, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    longest = max(1, min(PROMPT_LENGTHS[0], (limit or PROMPT_LENGTHS[0] + CONTINUATION) - CONTINUATION))
    lengths = (longest, min(longest, PROMPT_LENGTHS[1]), *[CONTINUATION] * 3)
    cuts = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
    parts = [tokens[start:end] for start, end in itertools.pairwise(cuts)]
    if isinstance(pad, int) and 0 <= pad < vocabulary:
        parts[0][longest // 2] = pad
        for part in parts[2:]:
            part[2] = pad
    prompts, continuations = parts[:2], parts[2:]
    return [tuple(part) for part in prompts], [tuple(part) for part in continuations]


def _refusal(what: str) -> UserError:
    return UserError(what, where="model", mend="take a causal language model of transformers that reads token ids alone")
