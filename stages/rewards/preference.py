"""The preference reward of the RL for all scenarios: what a reward model says of an answer (DeepSeek-R1, section 3.2.2).

The paper's helpfulness model judges the final summary alone, its safety model the whole answer; `reads` says which. The part is
the model's raw number, of any size and sign: weigh it, and use it late and for few steps (the paper: the last 400 of 1,700, for
a policy learns to please the model).
"""

import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.contract.errors import UserError
from stages.problems.episode import Episode
from stages.rewards.chat_rendering import TemplateFault, rendered
from stages.rewards.settings import PreferenceModel
from stages.rewards.tags import THINK_CLOSE

_warned: list[str] = []
"""The first fault of the chat template, which is reported once."""


def preferences(settings: PreferenceModel, episodes: Sequence[Episode]) -> list[float]:
    """A number per answer, higher is better; NaN where the model's chat template does not render the answer.

    Raises UserError when the folder has no such model.
    """
    assert settings.path is not None, "the stage's folder was not filled in"
    model, tokenizer = _loaded(settings.path, settings.device)
    texts = [_conversation(tokenizer, e.problem.question, read(e.text, settings.reads)) for e in episodes]
    scores = iter(_scores(model, tokenizer, [text for text in texts if text is not None], settings.batch, settings.max_tokens))
    return [math.nan if text is None else next(scores) for text in texts]


def read(text: str, reads: str) -> str:
    """What of an answer is judged: all of it, or what follows the thinking.

    >>> read("<think>a</think><answer>b</answer>", "summary")
    '<answer>b</answer>'
    """
    return text if reads == "all" else text.rpartition(THINK_CLOSE)[2].strip()


def _conversation(tokenizer: Any, question: str, answer: str) -> str | None:
    if tokenizer.chat_template is None:
        return f"{question}\n{answer}"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        return rendered(tokenizer, turns)
    except TemplateFault as fault:
        if not _warned:
            _warned.append(str(fault))
            what = UserError(f"the chat template does not render an answer ({fault})", where="rewards.preference_model")
            print(f"warning: {what}; said once", file=sys.stderr, flush=True)
        return None


def _scores(model: Any, tokenizer: Any, texts: list[str], batch: int, max_tokens: int) -> list[float]:
    import torch

    # A chat template writes its own special tokens.
    plain = tokenizer.chat_template is None
    ids = tokenizer(texts, truncation=True, max_length=max_tokens, add_special_tokens=plain)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # like lengths together: little is filled up
    found = [0.0] * len(ids)
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        padded = tokenizer.pad({"input_ids": [ids[i] for i in some]}, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            said = model(**padded).logits[:, 0].float().tolist()  # (B, 1)
        for index, value in zip(some, said, strict=True):
            found[index] = value
    return found


@functools.cache
def _loaded(path: str, device: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from stages.engine import distributed

    mend = "name a Hugging Face folder of a sequence-classification model with one label and its tokenizer"
    if not (Path(path) / "config.json").is_file():
        raise UserError("no config.json", where=path, mend=mend)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # a damaged folder makes its libraries raise anything
        raise UserError(f"the preference model cannot be loaded ({error})", where=path, mend=mend) from error
    if missing := sorted(info["missing_keys"]):  # they would silently be random
        raise UserError(f"its weights lack `{missing[0]}`: not a preference model", where=path, mend=mend)
    if model.config.num_labels != 1:
        raise UserError(f"the model has {model.config.num_labels} labels, one is wanted", where=path, mend=mend)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    chosen = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    # With its index: without one it would be GPU 0 for every rank, for the thread that judges is a new one.
    return model.to(distributed.local_device(chosen)).eval(), tokenizer
