"""The module that DeepSpeed trains: a causal language model that says how likely given tokens are.

Only tokens that are predicted go through the language-model head, in chunks that are computed again in the backward pass, so
no array of tokens × vocabulary lives longer than its chunk. The logits are divided by the sampling temperature, so that the
trainer's log-probabilities are those of the distribution the sampler drew from.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stages.engine.rows import Rows

CHUNK = 1024
"""Predicted tokens per pass through the head (128 to 1024 were equally fast on a CPU)."""


class TokenScorer(nn.Module):
    """Wraps a Hugging Face causal language model (`.model`)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # A pad id may be a real token (SmolLM2: `<|im_end|>`). Nothing here is masked by id, so its row learns like any other;
        # with padding_idx set, its gradient would be dropped in silence.
        model.get_input_embeddings().padding_idx = None  # type: ignore[operator]

    def forward(self, rows: Rows, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each predicted token.

        Returns two float32 tensors of shape (N,); entropy (in nats) carries no gradient.
        """
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()  # type: ignore[operator]
        output = decoder(input_ids=rows.tokens, attention_mask=rows.visible(), position_ids=rows.positions, use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1)[rows.predictor]  # (N, hidden)

        def chunk(part: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logp = torch.log_softmax(head(part).float() / temperature, dim=-1)  # (n, vocabulary)
            entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
            return logp.gather(-1, targets[:, None]).squeeze(-1), entropy

        if len(hidden) <= CHUNK or not torch.is_grad_enabled():
            parts = [chunk(h, t) for h, t in zip(hidden.split(CHUNK), rows.targets.split(CHUNK), strict=True)]
        else:
            parts = [
                checkpoint(chunk, h, t, use_reentrant=False)
                for h, t in zip(hidden.split(CHUNK), rows.targets.split(CHUNK), strict=True)
            ]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
