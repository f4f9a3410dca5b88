"""Supervised fine-tuning: the cold start, the SFT on 800k samples (DeepSeek-R1, section 2.3), and distillation (2.4).

The *base* model is trained on answers that were sampled and found correct and readable, or on the user's own; only the answers
are learned, the prompts are read. Documents are packed without seeing each other; the paper does not say whether its were.
"""

import sys
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.contract.config import ADDED, DatasetRef, ModelRef, StageConfig
from stages.contract.errors import UserError
from stages.engine.settings import DeepSpeedName, Lora
from stages.store.manifest import LEARNING
from stages.store.stage import Result, StageContext, StageKind, warn
from stages.supervised.settings import Supervised, Validation


class SFTConfig(StageConfig, Supervised):
    """Model, data and the settings of supervised training."""

    kind: Literal["sft"]
    """This kind."""
    model: ModelRef
    """The stage whose model is trained: the base, not the one that sampled."""
    data: DatasetRef | tuple[DatasetRef, ...]
    """The stage whose dataset it learns: parquet with columns `prompt` and `completion`. Of a list of stages all documents are
    read; of a mapping from stage to weight, as many from each as its weight says."""
    weights: Annotated[tuple[float, ...] | None, ADDED] = None
    """Weight of each stage of `data`: the share of the documents that come from it. A mapping in `data` sets it. Null: every
    document equally often."""
    epochs: int = Field(default=2, ge=1)
    """Passes over the data (the paper: 2 to 3). With weights an epoch has as many documents as there are, and a small dataset
    with a large weight is read more often."""
    longest: Annotated[int | None, ADDED] = Field(default=None, ge=2)
    """Tokens of the longest document taken, prompt and answer (the paper: 32,768); longer ones are left out and counted.
    Null: what the model's window holds."""
    validation: Annotated[Validation, ADDED] = Validation()
    """Documents that are held out."""
    lr: float = Field(default=1e-5, gt=0)
    """Peak learning rate (the paper: 5e-6 for the largest model, 1e-4 for 1.5B)."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Shape of the learning rate; the paper's is a cosine to a tenth."""
    lora: Annotated[Lora | None, ADDED] = None
    """Train low-rank adapters instead of all weights. Null: all weights."""
    deepspeed: DeepSpeedName = "zero0"
    """DeepSpeed settings: `zero0` to `zero3`, or the path of a JSON file."""

    @model_validator(mode="before")
    @classmethod
    def _weighted(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("data"), dict):
            return given
        if given.get("weights") is not None:
            raise ValueError("give the weights in `data` or in `weights`, not in both")
        return {**given, "data": tuple(given["data"]), "weights": tuple(given["data"].values())}

    @model_validator(mode="after")
    def _one_weight_each(self) -> Self:
        if not self.datasets or len(set(self.datasets)) < len(self.datasets):
            raise ValueError("`data` names no stage, or one twice")
        if self.weights is not None and (len(self.weights) != len(self.datasets) or min(self.weights) <= 0):
            raise ValueError("every stage of `data` needs a weight above 0")
        return self

    @property
    def datasets(self) -> tuple[str, ...]:
        """The stages whose datasets are learned."""
        return (self.data,) if isinstance(self.data, str) else self.data


def run(context: StageContext[SFTConfig]) -> Result:
    """Train on the dataset."""
    from stages.engine.adapters import adapted
    from stages.engine.changed_weights import same_weights
    from stages.engine.deepspeed_engine import Engine
    from stages.engine.packing.pack import Text
    from stages.engine.scorer import TokenScorer
    from stages.engine.self_check import FEW, check_engine, check_texts
    from stages.rewards.learning import sft_learning
    from stages.rollout.token_text import end_tokens
    from stages.rollout.torch_engine import load_model, load_tokenizer, pick_device
    from stages.supervised.documents import hold_out, load_documents, tokenize
    from stages.supervised.held_out import HeldOut
    from stages.supervised.order import Order
    from stages.supervised.train import train
    from stages.tracking.journal import read

    config = context.config
    roles = ["data"] if isinstance(config.data, str) else [f"data.{number}" for number in range(len(config.data))]
    documents = [
        document
        for number, role in enumerate(roles)
        for document in load_documents(context.inputs[role] / "train.parquet", number)
    ]
    tokenizer = load_tokenizer(context.inputs["model"])
    model = load_model(context.inputs["model"])
    ends = end_tokens(model, tokenizer)
    scorer = TokenScorer(adapted(model, config.lora, config.seed))
    encoded = tokenize(documents, tokenizer, ends)
    window = min(limit for limit in (config.longest, (scorer.longest or 2**62) + 1) if limit is not None)
    fitting = [n for n, (prompt, completion) in enumerate(encoded) if len(prompt) + len(completion) <= window]
    remarks = []
    if long := len(documents) - len(fitting):
        remarks.append(f"data: {long} of {len(documents)} documents left out, which are longer than {window} tokens")
    if twice := sum(not ends.isdisjoint(completion[:-1]) for _, completion in encoded):
        what = "an end token inside its answer, after which a model that samples would have stopped"
        remarks.append(f"data: {twice} of {len(documents)} documents have {what}")
    documents, texts = [documents[n] for n in fitting], [Text(*encoded[n]) for n in fitting]
    if not documents:
        mend = "raise `longest`, or take a model with a larger window"
        raise UserError(f"every document is longer than {window} tokens", where="data", mend=mend)
    trained, held = hold_out(documents, config.validation, config.seed)
    sizes = [sum(documents[n].dataset == number for n in trained) for number in range(len(roles))]
    if config.weights is not None and 0 in sizes:
        name = config.datasets[sizes.index(0)]
        raise UserError(f"no document of `{name}` is left to train on", where="data", mend="give it more, or no weight")
    measure = None
    if held:
        names = [config.datasets[documents[n].dataset] for n in held]
        measure = HeldOut([texts[n] for n in held], names, config.packing.micro_tokens)
    places = config.epochs * len(trained)
    order = Order(sizes, config.weights, places=places, batch=config.batch, seed=config.seed)
    engine = Engine(scorer, config, config.deepspeed, pick_device(config.compute.device))
    first = [texts[n] for n in trained[:FEW]]
    check = check_engine(engine, check_texts(engine.model, [t.prompt for t in first], [t.completion for t in first]))
    warnings = [check.warning] if check.warning else []
    warn(warnings, main=context.main)
    remarks += warnings
    merge = config.lora is not None and config.lora.merge
    metrics = check.metrics | train(
        context, engine, tokenizer, [texts[n] for n in trained], order, config, measure, config.validation.every, merge
    )
    metrics |= {"documents": float(len(trained))}
    if held:
        metrics |= {"held_out_documents": float(len(held))}
    lengths = [len(texts[n].prompt) + len(texts[n].completion) for n in trained]
    tokens = sum(lengths[number] for step in range(order.steps) for number in order.of_step(step))
    notes: dict[str, Any] = {}
    if context.main:
        unchanged = same_weights(context.inputs["model"], context.folder.output("model"))
        learning = sft_learning((line.metrics for line in read(context.folder.journal)), unchanged=unchanged)
        notes[LEARNING] = learning.note()
        if learning.sentence:
            remarks.insert(0, learning.sentence)
            print(f"warning: {learning.sentence}", file=sys.stderr, flush=True)
    return Result(metrics=metrics, notes=notes, remarks=remarks, tokens=tokens)


KIND = StageKind(name="sft", version=2, config=SFTConfig, output="model", run=run, distributed=True)
"""Supervised training: the cold start, the 800k samples, distillation."""
