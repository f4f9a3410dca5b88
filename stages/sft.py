"""Supervised fine-tuning: the cold start (DeepSeek-R1, section 3), and later distillation.

The *base* model is trained on answers that were sampled and found correct and readable; only the answers are learned, the
prompts are read.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from stages.engine.settings import DeepSpeedName
from stages.problems.rows import read_rows
from stages.store.config import DatasetRef, ModelRef, StageConfig
from stages.store.errors import UserError
from stages.store.stage import Result, StageContext, StageKind
from stages.supervised.settings import Supervised


class SFTConfig(StageConfig, Supervised):
    """Model, data and the settings of supervised training."""

    kind: Literal["sft"]
    """This kind."""
    model: ModelRef
    """The stage whose model is trained: the base, not the one that sampled."""
    data: DatasetRef
    """The stage whose dataset it learns: parquet with columns `prompt` and `completion`."""
    epochs: int = Field(default=2, ge=1)
    """Passes over the data (the paper: 2 to 3)."""
    lr: float = Field(default=1e-5, gt=0)
    """Peak learning rate (the paper: 5e-6 for the largest model, 1e-4 for 1.5B)."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Shape of the learning rate; the paper's is a cosine to a tenth."""
    deepspeed: DeepSpeedName = "zero0"
    """DeepSpeed settings: `zero0` to `zero3`, or the path of a JSON file."""


def run(context: StageContext[SFTConfig]) -> Result:
    """Train on the dataset."""
    from stages.engine.deepspeed_engine import Engine
    from stages.engine.packed import Text
    from stages.engine.scorer import TokenScorer
    from stages.rollout.torch_engine import load_model, load_tokenizer, pick_device
    from stages.supervised.train import train

    config = context.config
    texts = load_texts(context.inputs["data"] / "train.parquet")
    tokenizer = load_tokenizer(context.inputs["model"])
    model = load_model(context.inputs["model"])
    end = tokenizer.eos_token_id
    if end is None:
        mend = "set eos_token in its tokenizer_config.json"
        raise UserError("the tokenizer has no end token, so no answer would end", where=str(context.inputs["model"]), mend=mend)
    documents = [
        Text(tokenizer(prompt).input_ids, [*tokenizer(completion, add_special_tokens=False).input_ids, end])
        for prompt, completion in texts
    ]
    engine = Engine(TokenScorer(model), config, config.deepspeed, pick_device(config.compute.device))
    metrics = train(context, engine, tokenizer, documents, config.epochs * len(documents), config)
    tokens = config.epochs * sum(len(d.prompt) + len(d.completion) for d in documents)
    return Result(metrics=metrics | {"documents": float(len(documents))}, tokens=tokens)


def load_texts(path: Path) -> list[tuple[str, str]]:
    """Prompt and completion of each row of a dataset.

    Raises UserError when a row has none: a dataset is a stage's output, in which nothing is left out.
    """
    mend = "compute the stage that made it again (--fresh)"
    texts = []
    for row in read_rows(path):
        prompt, completion = row.values.get("prompt"), row.values.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str):
            what = f"row {row.number} has no text in `prompt` and `completion`"
            raise UserError(what, where=str(path), mend=mend)
        texts.append((prompt, completion))
    if not texts:
        raise UserError("the dataset has no rows", where=str(path), mend="loosen the filters of the stage that made it")
    return texts


KIND = StageKind(name="sft", version=1, config=SFTConfig, output="model", run=run, distributed=True)
