"""Every causal LM class of transformers: trained and sampled log-probabilities are its own, or it is refused in one line."""

import functools
import math

import pytest
import torch
import transformers

from stages.engine.position_limit import position_limit
from stages.problems.toy import save_toy_tokenizer
from tests.architectures.build import BLOCKED, NOT_TEXT, POSITIONS, WINDOW, build, classes, own_logits
from tests.architectures.paths import Paths, paths
from tests.architectures.table import COMMAND, TABLE, render

TOLERANCE = 1e-4
"""Nats, in float32."""

BUILT = [name for name in classes() if name not in BLOCKED]

FAMILIES = {
    "LlamaForCausalLM": ("packed", "fast"),
    "GraniteForCausalLM": ("packed", "padded, shared"),  # scaled logits
    "CohereForCausalLM": ("packed", "padded, shared"),  # scaled logits, tied
    "Gemma2ForCausalLM": ("rows", "padded, shared"),  # soft caps, sliding window
    "MistralForCausalLM": ("packed", "padded, shared"),  # sliding window
    "MixtralForCausalLM": ("packed", "padded, shared"),  # mixture of experts
    "DeepseekV3ForCausalLM": ("packed", "padded, shared"),  # latent attention
    "GPT2LMHeadModel": ("packed", "padded, shared"),  # learned positions
    "BartForCausalLM": ("rows", "equal, shared"),  # learned positions that cannot be handed in
    "Lfm2ForCausalLM": ("rows", "padded, shared"),  # short convolutions
    "Qwen3NextForCausalLM": ("rows", "padded, shared"),  # linear attention
    "GraniteMoeHybridForCausalLM": ("rows", "padded, shared"),  # state space and attention
    "MambaForCausalLM": ("rows", "padded, shared"),  # state space
    "RecurrentGemmaForCausalLM": ("rows", "equal, rows"),  # its state lies in the model
    "RwkvForCausalLM": ("rows", "equal, none"),  # a state that forgets what transformers hands on
    "BertLMHeadModel": ("packed", "padded, shared"),  # an encoder as a decoder
}
"""A class of each family, with its paths."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The paths of a class, worked out once."""
    transformers.logging.set_verbosity_error()
    tokenizer = save_toy_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return functools.cache(lambda name: paths(name, tokenizer))


def check(found: Paths) -> None:
    for difference in found.differences.values():
        assert difference <= TOLERANCE, found
    for path, kinds in ((found.train, ("train", "train beyond the window")), (found.sample, ("sample",))):
        assert (path == "refused") == (kinds[0] in found.refusals), found
        assert path == "refused" or all(kind in found.differences for kind in kinds), found
    for line in found.refusals.values():
        assert line.startswith("model: ") and "\n" not in line and len(line) < 400


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_is_trained_and_sampled_by_its_own_log_probabilities(name, measured):
    found = measured(name)
    check(found)
    assert (found.train, found.sample) == FAMILIES[name]
    assert len(found.lengths) > 1, "answers must have left their batch at different times"


def test_logits_of_small_models_are_far_from_uniform():
    for name in ("CohereForCausalLM", "InklingForCausalLM", "LlamaForCausalLM", "MambaForCausalLM"):
        with torch.no_grad():
            logp = own_logits(build(name), torch.arange(4, 40)[None]).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1).mean()
        assert entropy < 0.85 * math.log(logp.shape[-1]), name


def test_nine_of_ten_classes_are_built():
    names = classes()
    assert len(names) == len(set(names)) > 150
    assert set(BLOCKED) <= set(names)
    assert len(BUILT) >= 0.9 * len(names)


@pytest.mark.parametrize("name", BLOCKED)
def test_a_class_that_is_not_built_fails_for_the_stated_reason(name):
    _, error = BLOCKED[name]
    with pytest.raises((ImportError, ValueError), match=error):
        build(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_every_class_is_trained_and_sampled_by_its_own_log_probabilities_or_refused(name, measured):
    check(measured(name))


@pytest.mark.slow
def test_the_table_of_architectures_is_current(measured):
    found = {name: measured(name) for name in BUILT}
    assert TABLE.read_text(encoding="utf-8") == render(found), f"run `{COMMAND}`"


LIMITS = {
    "GPT2LMHeadModel": POSITIONS,
    "OPTForCausalLM": POSITIONS,  # a table with two more rows
    "RobertaForCausalLM": POSITIONS - 1,  # its first row is the pad token's (id 0)
    "CTRLLMHeadModel": POSITIONS,  # sines in a table
    "CodeGenForCausalLM": POSITIONS,  # rotary angles in a table
    "MptForCausalLM": POSITIONS,  # a bias for each distance
    "ReformerModelWithLMHead": POSITIONS,  # 8 by 8 positions
    "GitForCausalLM": POSITIONS,  # its image encoder has a table, too
    "XGLMForCausalLM": None,  # a table that grows
    "LlamaForCausalLM": None,
    "BloomForCausalLM": None,
    "MambaForCausalLM": None,
}


@pytest.mark.parametrize("name", LIMITS)
def test_position_limit_is_the_longest_text_that_the_forward_reads(name):
    model = build(name)
    assert position_limit(model) == LIMITS[name] == longest_read(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BUILT if name not in (*NOT_TEXT, "ProphetNetForCausalLM")])
def test_position_limit_of_every_class_is_the_longest_text_that_its_forward_reads(name):
    model = build(name)
    assert position_limit(model) == longest_read(model)


def longest_read(model):
    """Tokens of the longest text that a model's forward reads, up to POSITIONS + 2; None for one that reads twice POSITIONS."""
    longest = None
    for length in (WINDOW, POSITIONS - 1, POSITIONS, POSITIONS + 1, POSITIONS + 2, 2 * POSITIONS):
        try:
            with torch.inference_mode():
                own_logits(model, torch.full((1, length), 7))
        except (IndexError, RuntimeError, ValueError):
            return longest
        longest = length
    return None
