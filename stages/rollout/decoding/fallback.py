"""The transformers fallback: decoding by a model's own forward, for every model that `decoder.py` does not decode.

Each distinct prompt of a batch is prefilled once and its cache repeated for its answers; finished rows leave the batch. Which
of this a model allows, and whether prompts of unequal lengths may share a batch, is its `Mode` (mode.py).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from stages.rollout.decoding.batching import Answer, Ended, Over
from stages.rollout.decoding.token_sampling import Choose
from stages.rollout.decoding.transformers_batch import Mode, TransformersBatch
from stages.runtime import heartbeat


def decode(model: Any, answers: Sequence[Answer], choose: Choose, ended: Ended, over: Over, *, budget: int, mode: Mode) -> None:
    """Fill in every answer, in batches whose prompts and answers may come to `budget` tokens; otherwise as `Flight`.

    Args:
        model: a causal language model of transformers in evaluation mode.
        answers: neighbours share batches; so answers to prompts of one length stand together.
        choose: draws the next tokens.
        ended: whether rows have come to an end.
        over: called with each answer when its batch is done.
        budget: most tokens of a batch, unless one answer alone is longer.
        mode: how the model is decoded.

    """
    limit = max((len(answer.numbers) for answer in answers), default=0)
    for batch in _batches(answers, limit, budget, mode):
        _decode(model, batch, choose, ended, limit, mode)
        for answer in batch:
            over(answer)


def _batches(answers: Sequence[Answer], limit: int, budget: int, mode: Mode) -> Iterator[Sequence[Answer]]:
    """Neighbours that fit the budget; of one prompt length unless the mode pads."""
    start = 0
    while start < len(answers):
        longest, end = 0, start
        while end < len(answers):
            length = len(answers[end].prompt)
            longest = max(longest, length)
            full = (end + 1 - start) * (longest + limit) > budget
            if end > start and (full or (not mode.padded and length != len(answers[start].prompt))):
                break
            end += 1
        yield answers[start:end]
        start = end


def _decode(model: Any, answers: Sequence[Answer], choose: Choose, ended: Ended, limit: int, mode: Mode) -> None:
    prompts = list(dict.fromkeys(answer.prompt for answer in answers))
    number = {prompt: n for n, prompt in enumerate(prompts)}
    batch = TransformersBatch(model, prompts, [number[answer.prompt] for answer in answers], mode)
    device = batch.logits.device
    numbers = torch.stack([answer.numbers for answer in answers]).to(device)  # (R, limit)
    ids, alive = torch.zeros(len(answers), limit, dtype=torch.long, device=device), torch.arange(len(answers), device=device)
    logps, over = torch.zeros(len(answers), limit, device=device), torch.zeros(len(answers), dtype=torch.bool, device=device)
    for t in range(limit):
        heartbeat.progress()
        chosen, logp = choose(batch.logits.float(), numbers[alive, t])
        # A row that has ended may stay a while: what is written behind its end is never read.
        ids[alive, t], logps[alive, t] = chosen, logp
        stopped = ended(ids[alive], torch.full_like(alive, t + 1)) & ~over[alive]
        for row in alive[(~over[alive]) & (stopped | (t + 1 == limit))].tolist():
            answers[row].ids, answers[row].logprobs = ids[row, : t + 1].tolist(), logps[row, : t + 1].tolist()
        for row in alive[stopped].tolist():
            answers[row].stopped = True
        over[alive] |= stopped
        staying = (~over[alive]).nonzero().flatten()
        if not len(staying) or t + 1 == limit:
            return
        # Leaving costs a copy of the cache, so rows leave once an eighth of the batch has ended.
        if batch.can_drop and len(staying) * 8 <= len(alive) * 7:
            batch.keep(staying)
            chosen, alive = chosen[staying], alive[staying]
        batch.append(chosen)
