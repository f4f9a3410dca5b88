"""The shape of a language model, read off its transformers config: parameters, operations of a token, bytes of its context.

Llama, Qwen2, Qwen3 and what is built alike; mixtures of experts; multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.contract.errors import UserError

BIASED = ("qwen2", "qwen2_moe")
"""Model types whose queries, keys and values have a bias without saying so in the config."""


TIED_WITHOUT_GATE = ("gpt2", "openai-gpt", "gpt_bigcode", "gpt_neo", "opt", "bloom", "mpt", "xglm", "biogpt", "ctrl", "falcon")
"""Model types whose feed-forward layers have no gate, and whose head is the embedding unless the config says otherwise."""
WITHOUT_GATE = (*TIED_WITHOUT_GATE, "gpt_neox", "gptj", "codegen", "phi")
HIDDEN = ("hidden_size", "n_embd", "d_model")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
INNER = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "dff")
"""Names of one number in the configs of different model types, the usual one first."""


class UnknownShape(UserError):
    """A config of a model type whose size is not known here: the model may work all the same."""


@dataclass(frozen=True)
class Experts:
    """The feed-forward layers of a mixture of experts."""

    count: int
    """Routed experts of a layer."""
    chosen: int
    """Of which a token goes through so many."""
    shared: int
    """Experts that every token goes through."""
    width: int
    dense_layers: int
    """First layers that have an ordinary feed-forward layer."""


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: keys and values are kept compressed."""

    query_rank: int | None
    rank: int
    rotary: int
    """Numbers of a head that are turned by position, kept once for all heads."""
    plain: int
    value: int


@dataclass(frozen=True)
class Shape:
    """A decoder: L layers of width h."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    inner: int
    """Width of the (dense) feed-forward layers."""
    vocabulary: int
    tied: bool
    """Whether the head's weights are the embedding's."""
    biased: bool = False
    normed_heads: bool = False
    """Whether queries and keys are normed (Qwen3)."""
    gated: bool = True
    """Whether a feed-forward layer has a gate beside its two matrices (GPT-2 has none)."""
    experts: Experts | None = None
    latent: Latent | None = None

    @property
    def expert_layers(self) -> int:
        """Layers that are a mixture of experts."""
        return self.layers - self.experts.dense_layers if self.experts else 0

    @property
    def attention(self) -> int:
        """Weights of a layer's attention."""
        if self.latent is None:
            width, keys = self.heads * self.head_size, self.key_heads * self.head_size
            return self.hidden * (2 * width + 2 * keys) + (width + 2 * keys if self.biased else 0)
        a, heads = self.latent, self.heads
        query = self.hidden * heads * (a.plain + a.rotary)
        if a.query_rank is not None:
            query = self.hidden * a.query_rank + a.query_rank * heads * (a.plain + a.rotary)
        keys = self.hidden * (a.rank + a.rotary) + a.rank * heads * (a.plain + a.value)
        return query + keys + heads * a.value * self.hidden

    def feed_forward(self, experts: float) -> float:
        """Weights of all feed-forward layers together, of which so many routed experts of each layer count."""
        dense = (self.layers - self.expert_layers) * (3 if self.gated else 2) * self.hidden * self.inner
        if self.experts is None:
            return dense
        one = 3 * self.hidden * self.experts.width
        router = self.hidden * self.experts.count
        return dense + self.expert_layers * (one * (experts + self.experts.shared) + router)

    @property
    def head(self) -> int:
        """Weights of the language-model head (the embedding's, if tied)."""
        return self.hidden * self.vocabulary

    @property
    def norms(self) -> int:
        """Weights of the norms."""
        per_layer = 2 * self.hidden + (2 * self.head_size if self.normed_heads else 0)
        if self.latent is not None:
            per_layer += self.latent.rank + (self.latent.query_rank or 0)
        return self.layers * per_layer + self.hidden

    @property
    def parameters(self) -> int:
        """All weights."""
        routed = self.experts.count if self.experts else 0
        ends = self.head * (1 if self.tied else 2)
        return round(ends + self.layers * self.attention + self.feed_forward(routed) + self.norms)

    @property
    def active(self) -> int:
        """Weights that a token goes through, the head among them and the embedding, of which it reads one row, not."""
        return round(self.body + self.head)

    @property
    def body(self) -> float:
        """Weights that a token goes through, without head and embedding."""
        routed = self.experts.chosen if self.experts else 0
        return self.layers * self.attention + self.feed_forward(routed) + self.norms

    def touched(self, rows: float) -> float:
        """Weights that a step of decoding reads with so many rows: of experts, those that some row is sent to."""
        if self.experts is None:
            return self.body + self.head
        share = 1 - (1 - self.experts.chosen / self.experts.count) ** max(rows, 1.0)
        return self.layers * self.attention + self.feed_forward(self.experts.count * share) + self.norms + self.head

    def seen(self, *, decoding: bool = False) -> int:
        """Operations of attention for one token that sees one key, in all layers. Latent attention decodes compressed."""
        if self.latent is None:
            return 4 * self.layers * self.heads * self.head_size
        a = self.latent
        widths = 2 * a.rank + a.rotary if decoding else a.plain + a.rotary + a.value
        return 2 * self.layers * self.heads * widths

    def context_bytes(self, item: int) -> int:
        """Bytes of keys and values of one token, of `item` bytes a number."""
        kept = 2 * self.key_heads * self.head_size if self.latent is None else self.latent.rank + self.latent.rotary
        return self.layers * kept * item

    def kept(self, item: int) -> int:
        """Bytes that the forward pass keeps of one token for its gradient, in all layers.

        Of a layer: both norms' input, intermediate and output (6 h), queries twice (as they are and spread by text: 2 h),
        attention's output twice (2 h), keys and values twice (4 K), gate, its activation, up and their product (4 i).
        """
        width = self.heads * (self.latent.plain + self.latent.rotary if self.latent else self.head_size)
        keys = 2 * (width if self.latent else self.key_heads * self.head_size)
        inner = (self.layers - self.expert_layers) * self.inner
        if self.experts:
            inner += self.expert_layers * self.experts.width * (self.experts.chosen + self.experts.shared)
        return item * (self.layers * (6 * self.hidden + 4 * width + 2 * keys) + 4 * inner)


def shape_of(config: Mapping[str, Any], where: str) -> Shape:
    """The shape that a transformers config describes; `where` names it in errors.

    Raises:
        UnknownShape: A key is missing, or its value is no number.

    """
    try:
        text = config.get("text_config")  # a model that also reads images
        return _shape(text if isinstance(text, Mapping) else config)
    except (KeyError, TypeError, ArithmeticError) as error:
        what = f"the model's config lacks {error}" if isinstance(error, KeyError) else f"the model's config is odd ({error})"
        mend = "name the config.json of a decoder such as Llama, Qwen or DeepSeek"
        raise UnknownShape(what, where=where, mend=mend) from error


def _first(config: Mapping[str, Any], names: Sequence[str]) -> int:
    """The first of some keys that is there. Raises KeyError, with the usual name, when none is."""
    for name in names:
        if config.get(name) is not None:
            return int(config[name])
    raise KeyError(names[0])


def _shape(config: Mapping[str, Any]) -> Shape:
    hidden, heads, kind = _first(config, HIDDEN), _first(config, HEADS), str(config.get("model_type", ""))
    gated = kind not in WITHOUT_GATE
    count = config.get("n_routed_experts") or config.get("num_experts") or config.get("num_local_experts")
    experts = latent = None
    if count:
        experts = Experts(
            count=count,
            chosen=config["num_experts_per_tok"],
            shared=config.get("n_shared_experts") or 0,
            width=config.get("moe_intermediate_size") or config["intermediate_size"],
            dense_layers=config.get("first_k_dense_replace") or 0,
        )
    if config.get("kv_lora_rank"):
        latent = Latent(
            query_rank=config.get("q_lora_rank"),
            rank=config["kv_lora_rank"],
            rotary=config["qk_rope_head_dim"],
            plain=config["qk_nope_head_dim"],
            value=config["v_head_dim"],
        )
    return Shape(
        hidden=hidden,
        layers=_first(config, LAYERS),
        heads=heads,
        key_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or hidden // heads,
        inner=_first(config, INNER) if gated or any(config.get(name) for name in INNER) else 4 * hidden,
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", kind in TIED_WITHOUT_GATE)),
        biased=bool(config.get("attention_bias")) or kind in BIASED,
        normed_heads=kind.startswith("qwen3"),
        gated=gated,
        experts=experts,
        latent=latent,
    )
