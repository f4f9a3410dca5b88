"""The toy's base model: a small Llama that has read documents about chains of sums, most of them answered without thinking.

It stands for DeepSeek-V3-Base in the quickstart: it can reason step by step, seldom does, mixes two scripts when it does, and
mostly answers at once and wrongly. It departs from the paper in everything but that role.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.contract.config import ADDED, StageConfig
from stages.engine.settings import DeepSpeedName, deepspeed_settings
from stages.problems.toy import END, PAD, SYMBOLS, VOCABULARY, ToyDocuments, save_toy_tokenizer, toy_documents
from stages.store.stage import Result, StageContext, StageKind, warn
from stages.supervised.settings import Supervised


class ToyBaseConfig(StageConfig, Supervised):
    """Size, documents and training of the toy's base model."""

    kind: Literal["toy_base"]
    """This kind."""
    hidden: int = Field(default=128, ge=16)
    """Width of the model."""
    intermediate: int = Field(default=384, ge=16)
    """Width of the feed-forward layers."""
    layers: int = Field(default=4, ge=1)
    """Number of layers."""
    heads: int = Field(default=4, ge=1)
    """Attention heads; `hidden` must be divisible by them."""
    documents: ToyDocuments = ToyDocuments()
    """What it reads."""
    steps: int = Field(default=900, ge=1)
    """Optimizer steps; every step reads new documents."""
    optimizer: Annotated[Literal["adamw", "muon"], ADDED] = "adamw"
    """`muon`: Muon for the matrices of hidden layers, AdamW for the rest: about a third of the steps. It needs ZeRO 0."""
    lr: float = Field(default=2e-3, gt=0)
    """Peak learning rate (measured: this size learns fastest at it with AdamW)."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Shape of the learning rate."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps in which the learning rate rises."""
    batch: int = Field(default=96, ge=1)
    """Documents of a step."""
    deepspeed: DeepSpeedName = "zero0"
    """DeepSpeed settings."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden ({self.hidden}) must be divisible by twice the heads ({self.heads})")
        return self

    @model_validator(mode="after")
    def _whole_matrices(self) -> Self:
        if self.optimizer == "muon" and deepspeed_settings(self.deepspeed).get("zero_optimization", {}).get("stage", 0):
            raise ValueError("optimizer: muon needs whole matrices; use deepspeed: zero0, or optimizer: adamw")
        return self


def run(context: StageContext[ToyBaseConfig]) -> Result:
    """Build the model from its seed and train it."""
    import tempfile
    from pathlib import Path

    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from stages.engine.deepspeed_engine import Engine
    from stages.engine.packing.pack import Text
    from stages.engine.scorer import TokenScorer
    from stages.engine.self_check import FEW, check_engine, check_texts
    from stages.rollout.torch_engine import pick_device
    from stages.supervised.order import Order
    from stages.supervised.train import train

    config = context.config
    end, pad = SYMBOLS.index(END), SYMBOLS.index(PAD)
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=end,
            pad_token_id=pad,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = save_toy_tokenizer(Path(folder))
    table = {symbol: number for number, symbol in enumerate(SYMBOLS)}
    count = config.steps * config.batch
    documents = []
    for question, text in toy_documents(config.documents, count, config.seed):
        prompt = [table[symbol] for symbol in question]
        documents.append(Text(prompt, [*tokenizer(text).input_ids, end]))
    engine = Engine(
        TokenScorer(model), config, config.deepspeed, pick_device(config.compute.device), muon=config.optimizer == "muon"
    )
    first = documents[:FEW]
    check = check_engine(engine, check_texts(model, [t.prompt for t in first], [t.completion for t in first]))
    warnings = [check.warning] if check.warning else []
    warn(warnings, main=context.main)
    order = Order([count], None, places=count, batch=config.batch, seed=config.seed)
    metrics = train(context, engine, tokenizer, documents, order, config)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = sum(len(d.prompt) + len(d.completion) for d in documents)
    return Result(metrics=metrics | check.metrics | {"parameters": float(parameters)}, remarks=warnings, tokens=tokens)


KIND = StageKind(name="toy_base", version=1, config=ToyBaseConfig, output="model", run=run, distributed=True)
