"""The modules that DeepSpeed trains: causal language models that say how likely given tokens are, and what prefixes are worth.

Only tokens that are predicted go through the language-model head, in chunks that are computed again in the backward pass, so
no array of tokens × vocabulary lives longer than its chunk. The logits are divided by the sampling temperature, so that the
trainer's log-probabilities are those of the distribution the sampler drew from.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from stages.engine.attention import NAME
from stages.engine.packed import Packed
from stages.engine.token_logp import token_logp
from stages.store.errors import UserError

CHUNK = 1024
"""Most predicted tokens in a pass through the head (128 to 1024 were equally fast on a CPU)."""


def chunks_for(predicted: int) -> int:
    """Passes through the head for so many predicted tokens."""
    return max(1, -(-predicted // CHUNK))


class Scorer(nn.Module):
    """Wraps a Hugging Face causal language model (`.model`) to read packed texts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        # Other attention code knows nothing of packed texts: it would not part them.
        if config._attn_implementation not in ("sdpa", NAME):
            raise UserError(
                f"`{type(model).__name__}` runs {config._attn_implementation} attention; training needs sdpa",
                where="model",
                mend="take a model that transformers runs with scaled_dot_product_attention",
            )
        config._attn_implementation = NAME
        sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        self.longest = sliding or getattr(config, "max_position_embeddings", None)
        # A pad id may be a real token (SmolLM2: `<|im_end|>`). Nothing here is masked by id, so its row learns like any other;
        # with padding_idx set, its gradient would be dropped in silence.
        model.get_input_embeddings().padding_idx = None  # type: ignore[operator]
        self._recomputed: list[nn.Module] = []

    def recompute(self) -> None:
        """Compute every layer again in the backward pass instead of keeping what is in it.

        Raises UserError for a model whose layers transformers cannot recompute.
        """
        try:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        except ValueError as error:
            raise UserError(str(error), where="gradient_checkpointing", mend="set it to false") from error
        self._recomputed = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]

    def hidden(self, packed: Packed) -> Tensor:
        """(D, hidden) the decoder's output at the token before each distinct predicted one.

        Raises UserError for a text longer than the model's window (packed texts know no sliding windows).
        """
        if self.longest is not None and packed.longest > self.longest:
            raise UserError(
                f"a text of {packed.longest} tokens is longer than the model's window of {self.longest}",
                where="sampling.max_tokens",
                mend="make it smaller",
            )
        decoder = self.model.get_decoder()  # type: ignore[operator]
        for layer in self._recomputed:
            # transformers asks the layer itself whether it is in training; dropout, further down, stays off.
            layer.training = torch.is_grad_enabled()
        output = decoder(
            input_ids=packed.tokens[None],
            position_ids=packed.positions[None],
            attention_mask=packed.tokens.new_ones(1, 1, 1, 1),  # four dimensions: transformers makes no mask of its own
            packed_layout=packed.layout,
            use_cache=False,
        )
        return output.last_hidden_state[0].index_select(0, packed.predictor)  # type: ignore[no-any-return]

    def likelihoods(self, hidden: Tensor, packed: Packed, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each distinct predicted token, (D,) float32 each, from the `hidden` of `packed`."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]

        def chunk(part: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            return token_logp(head(part), targets, temperature)

        # Ranks agreed on `chunks`; a rank with few tokens passes empty ones through.
        pieces = zip(hidden.tensor_split(packed.chunks), packed.targets.tensor_split(packed.chunks), strict=True)
        if packed.chunks == 1 or not torch.is_grad_enabled():
            parts = [chunk(h, t) for h, t in pieces]
        else:
            parts = [checkpoint(chunk, h, t, use_reentrant=False) for h, t in pieces]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


class TokenScorer(Scorer):
    """Says how likely given tokens are."""

    def forward(self, packed: Packed, temperature: float = 1.0) -> tuple[Tensor, ...]:
        """Log-probability and entropy of each predicted token.

        Returns two float32 tensors of shape (N,); entropy (in nats) carries no gradient.
        Raises UserError for a text longer than the model's window.
        """
        logp, entropy = self.likelihoods(self.hidden(packed), packed, temperature)
        return packed.each(logp), packed.each(entropy)


class ValueScorer(Scorer):
    """PPO's value model: a language model's decoder with a head of its own that says what a prefix is worth."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.head = value_head(model)
        model.set_output_embeddings(nn.Identity())  # type: ignore[operator]  # nothing is predicted here

    def forward(self, packed: Packed, temperature: float = 1.0) -> tuple[Tensor, ...]:  # noqa: ARG002  as TokenScorer's
        """(N,) float32: the value of what stands before each predicted token."""
        return (packed.each(self.head(self.hidden(packed)).float().squeeze(-1)),)


class TokenValueScorer(TokenScorer):
    """A policy with a value head on it: PPO with a shared value model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.head = value_head(model)

    def forward(self, packed: Packed, temperature: float = 1.0) -> tuple[Tensor, ...]:
        """Log-probability, entropy and value: as TokenScorer's and ValueScorer's together."""
        hidden = self.hidden(packed)
        value = self.head(hidden.to(self.head.weight.dtype)).float().squeeze(-1)
        said = *self.likelihoods(hidden, packed, temperature), value
        return tuple(packed.each(part) for part in said)


def value_head(model: nn.Module) -> nn.Linear:
    """A linear head that says 0 of everything: it has seen nothing yet."""
    trained = next(p for p in model.parameters() if p.requires_grad)  # adapters are float32, whatever the other weights are
    head = nn.Linear(model.config.hidden_size, 1, dtype=trained.dtype)  # type: ignore[union-attr,arg-type]
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head
