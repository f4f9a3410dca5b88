"""A model on disk, and TRL's trainers around it."""

import pytest

from tests.conftest import tiny_llama
from tests.peers.trl_material import ANSWERS, END, LONGEST, PAD, SAMPLES, load


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The model and its tokenizer on disk, for TRL reads its reference from there. A token's text is its number."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    tiny_llama().float().save_pretrained(path)
    words = {"<pad>": PAD, "<eos>": END} | {str(number): number for number in range(2, 32)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(path)
    return path


@pytest.fixture
def trainer(saved, tmp_path):
    """A function that builds one of TRL's trainers around a fresh copy of the model."""

    def build(kind="GRPO", rewards=None, **settings):
        import trl
        from datasets import Dataset
        from transformers import AutoTokenizer

        sizes = {"per_device_train_batch_size": ANSWERS, "num_generations": SAMPLES, "max_completion_length": LONGEST}
        plain = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
        config = getattr(trl, f"{kind}Config")(str(tmp_path), **(sizes | plain | settings))
        built = getattr(trl, f"{kind}Trainer")(
            model=load(saved),
            reward_funcs=lambda completions, **_: rewards,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["2"]}),
            processing_class=AutoTokenizer.from_pretrained(saved),
        )
        built.model.train()  # no dropout in it
        built.current_gradient_accumulation_steps = config.gradient_accumulation_steps  # its training loop sets this
        return built

    return build
