"""The slow path: decoding by transformers' own forward pass and cache, for models that `lean.py` does not know.

Each distinct prompt of a batch is prefilled once and its cache repeated for its answers; finished rows leave the batch.
"""

from collections.abc import Sequence
from typing import Any

import torch

from stages.rollout.flight import Answer, Ended, Over
from stages.rollout.sampling import Choose
from stages.store import heartbeat


def decode(model: Any, answers: Sequence[Answer], choose: Choose, ended: Ended, over: Over, *, budget: int) -> None:
    """Fill in every answer, in batches whose prompts and answers may come to `budget` tokens; otherwise as `Flight`."""
    start, limit = 0, max((len(answer.numbers) for answer in answers), default=0)
    while start < len(answers):
        longest, end = 0, start
        while end < len(answers):
            longest = max(longest, len(answers[end].prompt))
            if end > start and (end + 1 - start) * (longest + limit) > budget:
                break
            end += 1
        _decode(model, answers[start:end], choose, ended, limit)
        for answer in answers[start:end]:
            over(answer)
        start = end


def _decode(model: Any, answers: Sequence[Answer], choose: Choose, ended: Ended, limit: int) -> None:
    device = next(model.parameters()).device
    prompts = list(dict.fromkeys(answer.prompt for answer in answers))
    which = torch.tensor([prompts.index(answer.prompt) for answer in answers], device=device)  # (R,)
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts], device=device)  # (P, width)
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)
    mask = (torch.arange(width, device=device)[None] >= width - lengths[:, None]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    cache.batch_select_indices(which)
    logits, mask, positions = output.logits[which, -1], mask[which], lengths[which]
    numbers = torch.stack([answer.numbers for answer in answers]).to(device)  # (R, limit)
    ids, alive = torch.zeros(len(answers), limit, dtype=torch.long, device=device), torch.arange(len(answers), device=device)
    logps, over = torch.zeros(len(answers), limit, device=device), torch.zeros(len(answers), dtype=torch.bool, device=device)
    for t in range(limit):
        heartbeat.progress()
        chosen, logp = choose(logits.float(), numbers[alive, t])
        # A row that has ended may stay a while: what is written behind its end is never read.
        ids[alive, t], logps[alive, t] = chosen, logp
        stopped = ended(ids[alive], torch.full_like(alive, t + 1)) & ~over[alive]
        for row in alive[(~over[alive]) & (stopped | (t + 1 == limit))].tolist():
            answers[row].ids, answers[row].logprobs = ids[row, : t + 1].tolist(), logps[row, : t + 1].tolist()
        for row in alive[stopped].tolist():
            answers[row].stopped = True
        over[alive] |= stopped
        keep = (~over[alive]).nonzero().flatten()
        if not len(keep) or t + 1 == limit:
            return
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        # Leaving costs a copy of the cache, so rows leave once an eighth of the batch has ended.
        if len(keep) * 8 <= len(alive) * 7:
            cache.batch_select_indices(keep)
            chosen, mask, positions, alive = chosen[keep], mask[keep], positions[keep], alive[keep]
        output = model(
            input_ids=chosen[:, None],
            attention_mask=mask,
            position_ids=positions[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        logits, positions = output.logits[:, -1], positions + 1
