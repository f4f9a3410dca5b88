"""Log-likelihoods of given texts, for lm-eval tasks that compare choices instead of sampling."""

from typing import Any

import torch
from torch import Tensor

from stages.engine.windows import computed_limit

BATCH = 4
"""Rows scored at once: their logits over the whole vocabulary are held in memory."""


UNLIMITED = 4096
"""Tokens of a window for models that name no limit (state-space models)."""


def longest_text(model: Any) -> int:
    """Tokens that the model reads at once."""
    return computed_limit(model) or UNLIMITED


def continuation_scores(model: Any, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """Per (context, continuation) in token ids: the continuation's log-probability (nats), and whether it is the greedy one.

    The context is cut on its left when both do not fit into the model.
    """
    longest = longest_text(model)
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    scores: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        rows = [(pairs[i][0] + pairs[i][1])[-(longest + 1) :] for i in chosen]
        logp = _log_probabilities(model, rows)  # (B, T, V)
        for number, i in enumerate(chosen):
            count, end = len(pairs[i][1]), len(rows[number]) - 1
            if count == 0:
                continue
            targets = torch.tensor(pairs[i][1][-end:], device=logp.device)  # (C,)
            mine = logp[number, end - len(targets) : end]  # (C, V)
            total = mine.gather(-1, targets[:, None]).sum().item()
            scores[i] = (total, bool((mine.argmax(-1) == targets).all()))
    return scores


@torch.inference_mode()
def _log_probabilities(model: Any, rows: list[list[int]]) -> Tensor:
    """Log-probabilities of each row's next tokens. rows: B lists; result: (B, T, V) float32, padded on the right."""
    model.eval()
    device = next(model.parameters()).device
    width = max(len(row) for row in rows) - 1
    tokens = torch.tensor([row[:-1] + [0] * (width - len(row) + 1) for row in rows], device=device)
    lengths = torch.tensor([len(row) - 1 for row in rows], device=device)
    mask = (torch.arange(width, device=device)[None] < lengths[:, None]).long()
    logits: Tensor = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    return logits.float().log_softmax(-1)
