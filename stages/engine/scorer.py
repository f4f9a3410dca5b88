"""The modules that DeepSpeed trains: causal language models that say how likely given tokens are, and what prefixes are worth.

Two paths lead to the same numbers. *Packed*: many texts in one line of tokens, shared prompts computed once (pack.py), for
models whose attention goes through transformers' attention interface. *Rows*: one text at a time through the model's own
forward pass, for everything else (convolutions, linear attention, state spaces, windows). On both, the logits are those of the
model's own `forward` (own_head.py). Which path a stage takes is decided by self_check.py.

Only tokens that are predicted go through the language-model head, in chunks that are computed again in the backward pass, so
no array of tokens × vocabulary lives longer than its chunk. The logits are divided by the sampling temperature, so that the
trainer's log-probabilities are those of the distribution the sampler drew from.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from stages.contract.errors import UserError
from stages.engine.own_head import decoder_names, overwritable, own_logits
from stages.engine.packing.attention import NAME
from stages.engine.packing.pack import Packed, Text, micro_batches, row
from stages.engine.token_logp import token_logp
from stages.engine.windows import computed_limit, window

_UNREADABLE = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, UserError)
"""What a model's code raises when it is called in a way that it does not know."""

CHUNK = 1024
"""Most predicted tokens in a pass through the head (128 to 1024 were equally fast on a CPU)."""


def chunks_for(predicted: int) -> int:
    """Passes through the head for so many predicted tokens."""
    return max(1, -(-predicted // CHUNK))


def refused(model: nn.Module, reason: str) -> UserError:
    """The error that a model cannot be trained, or sampled, for a reason that is a property of its architecture."""
    hint = "take another model, or float32 weights if these have 16 bits"
    return UserError(f"`{type(model).__name__}` cannot be used: {reason}", where="model", mend=hint)


def own_forward_logp(model: nn.Module, row: Packed, temperature: float) -> tuple[Tensor, Tensor]:
    """(D,) log-probability and entropy of a row's predicted tokens by one call of the model on its text."""
    logits = model(input_ids=row.tokens[None], use_cache=False).logits[0].index_select(0, row.predictor)
    return token_logp(logits, row.targets, temperature)


class Scorer(nn.Module):
    """Wraps a Hugging Face causal language model (`.model`) to read packed texts and rows."""

    needs_states = False
    """Whether it reads the decoder's output and not logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        self.own_attention: str = config._attn_implementation
        """The attention implementation that transformers chose for the model, with which it reads rows."""
        if self.own_attention == NAME:  # another scorer of the same model
            self.own_attention = "sdpa"
        self.can_pack = self.own_attention == "sdpa"
        """Whether packed texts may be tried: other attention code does not separate them."""
        self.decoder_names = decoder_names(model)
        self.whole = not self.decoder_names
        """Whether rows go through the whole model at once, logits of all tokens included: its decoder cannot be run alone."""
        self.longest = computed_limit(model)
        """Most tokens of a text that are computed, or None: positions that the model has."""
        self.window = window(config)
        """Tokens that every layer sees, or None; packed texts must not be longer, rows may be."""
        # A pad id may be a real token (SmolLM2: `<|im_end|>`). Nothing here is masked by id, so its row learns like any other;
        # with padding_idx set, its gradient would be dropped in silence.
        model.get_input_embeddings().padding_idx = None  # type: ignore[operator]
        self._recomputed: list[nn.Module] = []

    def probe(self) -> None:
        """Find out how the model can be called at all: before DeepSpeed cuts its weights, as a failed pass would upset it.

        Raises UserError when its own forward fails, and where a value head needs states that cannot be had.
        """
        texts = [Text([0, 1], [1, 0, 1]), Text([0, 1], [1, 1])]
        device = next(self.model.parameters()).device
        alone, packed = row(texts[:1], [0]).to(device), micro_batches(texts, 64)[0].to(device)
        with torch.no_grad():
            if isinstance(self, TokenScorer):
                try:
                    self(alone, own=True)
                except _UNREADABLE as error:
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                    raise refused(self.model, f"its own forward pass fails ({reason})") from error
            self.can_pack = self.can_pack and self._works(packed)
            self.whole = self.whole or not self._works(alone)
        if self.whole and self.needs_states:
            raise refused(self.model, "its decoder cannot be run apart from its head, which a value model needs")

    def _works(self, packed: Packed) -> bool:
        try:
            self(packed)
        except torch.OutOfMemoryError:
            raise
        except _UNREADABLE:
            return False
        return True

    def adopt(self, other: "Scorer") -> None:
        """Call the model as another scorer of the same architecture, which was checked, calls its own."""
        self.can_pack, self.whole = other.can_pack, other.whole

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

        Raises UserError for a text longer than the model's positions, and for packed texts longer than its window.
        """
        self._prepare(packed)
        decoder = self.model.get_decoder()  # type: ignore[operator]
        if packed.layout is None:
            output = decoder(input_ids=packed.tokens[None], use_cache=False)
        else:
            output = decoder(
                input_ids=packed.tokens[None],
                position_ids=packed.positions[None],
                attention_mask=packed.tokens.new_ones(1, 1, 1, 1),  # four dimensions: transformers makes no mask of its own
                packed_layout=packed.layout,
                use_cache=False,
            )
        return output.last_hidden_state[0].index_select(0, packed.predictor)  # type: ignore[no-any-return]

    def _prepare(self, packed: Packed) -> None:
        """Check the lengths of texts, and choose the attention code and what is recomputed."""
        limit = self.longest if packed.layout is None else min(filter(None, (self.longest, self.window)), default=None)
        if limit is not None and packed.longest > limit:
            raise UserError(
                f"a text of {packed.longest} tokens is longer than the model's window of {limit}",
                where="sampling.max_tokens",
                mend="make it smaller",
            )
        # Not set back afterwards: layers that are recomputed in the backward pass read it again.
        attention = self.own_attention if packed.layout is None else NAME
        if self.model.config._attn_implementation != attention:  # type: ignore[union-attr]
            self.model.config._attn_implementation = attention  # type: ignore[union-attr]
        for layer in self._recomputed:
            # transformers asks the layer itself whether it is in training; dropout, further down, stays off.
            layer.training = torch.is_grad_enabled()

    def likelihoods(self, hidden: Tensor, packed: Packed, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each distinct predicted token, (D,) float32 each, from the `hidden` of `packed`."""

        def chunk(part: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            return token_logp(overwritable(own_logits(self.model, self.decoder_names, part)), targets, temperature)

        # Ranks agreed on `chunks`; a rank with few tokens passes empty ones through.
        pieces = zip(hidden.tensor_split(packed.chunks), packed.targets.tensor_split(packed.chunks), strict=True)
        if packed.chunks == 1 or not torch.is_grad_enabled():
            parts = [chunk(h, t) for h, t in pieces]
        else:
            parts = [checkpoint(chunk, h, t, use_reentrant=False) for h, t in pieces]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def own_likelihoods(self, row: Packed, temperature: float) -> tuple[Tensor, Tensor]:
        """As `likelihoods`, by one call of the whole model on the text of a row: what the two paths are compared with."""
        self._prepare(row)
        return own_forward_logp(self.model, row, temperature)


class TokenScorer(Scorer):
    """Says how likely given tokens are."""

    def forward(self, packed: Packed, temperature: float = 1.0, *, own: bool = False) -> tuple[Tensor, ...]:
        """Log-probability and entropy of each predicted token.

        own: call the whole model on the row, as its user would, without separating decoder and head.
        Returns two float32 tensors of shape (N,); entropy (in nats) carries no gradient.
        Raises UserError for a text longer than the model's positions or window.
        """
        if own or (self.whole and packed.layout is None):
            logp, entropy = self.own_likelihoods(packed, temperature)
        else:
            logp, entropy = self.likelihoods(self.hidden(packed), packed, temperature)
        return packed.each(logp), packed.each(entropy)


class ValueScorer(Scorer):
    """PPO's value model: a language model's decoder with a head of its own that says what a prefix is worth."""

    needs_states = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.head = value_head(model)
        model.set_output_embeddings(nn.Identity())  # type: ignore[operator]  # nothing is predicted here

    def forward(self, packed: Packed, temperature: float = 1.0) -> tuple[Tensor, ...]:  # noqa: ARG002  as TokenScorer's
        """(N,) float32: the value of what stands before each predicted token."""
        return (packed.each(self.head(self.hidden(packed)).float().squeeze(-1)),)


class TokenValueScorer(TokenScorer):
    """A policy with a value head on it: PPO with a shared value model."""

    needs_states = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.head = value_head(model)

    def forward(self, packed: Packed, temperature: float = 1.0, *, own: bool = False) -> tuple[Tensor, ...]:
        """Log-probability, entropy and value: as TokenScorer's and ValueScorer's together; without a value when `own`."""
        if own:
            return super().forward(packed, temperature, own=True)
        hidden = self.hidden(packed)
        value = self.head(hidden.to(self.head.weight.dtype)).float().squeeze(-1)
        parts = *self.likelihoods(hidden, packed, temperature), value
        return tuple(packed.each(part) for part in parts)


def value_head(model: nn.Module) -> nn.Linear:
    """A linear head that says 0 of everything: it has seen nothing yet."""
    trained = next(p for p in model.parameters() if p.requires_grad)  # adapters are float32, whatever the other weights are
    head = nn.Linear(model.config.hidden_size, 1, dtype=trained.dtype)  # type: ignore[union-attr,arg-type]
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head
