"""How long texts may be: positions of a table, windows, and the refusal before anything is computed."""

import pytest
import torch

from stages.contract.errors import UserError
from stages.engine.windows import check_lengths, text_limit, window
from stages.rollout.sampled_check import check_prompts_fit
from tests.small_models import small_model


@pytest.mark.parametrize(
    ("family", "limit", "seen"),
    [("llama", 256, None), ("gpt2", 256, None), ("opt", 256, None), ("mistral", 256, 16), ("mamba", None, None)],
)
def test_limits_of_a_family(family, limit, seen):
    model = small_model(family)
    if family == "mamba":
        del model.config.max_position_embeddings
    assert (text_limit(model), window(model.config)) == (limit, seen)


def test_text_behind_which_rotary_angles_change_is_a_window():
    short, long = [1.0] * 4, [2.0] * 4
    rope = {"rope_type": "longrope", "short_factor": short, "long_factor": long, "rope_theta": 1e4}
    model = small_model("llama", rope_parameters={**rope, "original_max_position_embeddings": 32})
    assert window(model.config) == 32


def test_window_that_is_switched_off_is_none():
    model = small_model("mistral")
    model.config.use_sliding_window = False
    assert window(model.config) is None


def test_text_of_more_tokens_than_positions_is_refused():
    model = small_model("gpt2", max_position_embeddings=48)
    check_lengths(model, 16, 33)  # 49 tokens, of which 48 are computed
    with pytest.raises(UserError) as error:
        check_lengths(model, 10, 64)
    assert str(error.value) == (
        "sampling.max_tokens: the longest prompt (10 tokens) and 64 more do not fit GPT2LMHeadModel's 48 positions; "
        "set it to 39 or less"
    )
    check_lengths(model, 10, 39)
    with pytest.raises(UserError, match="48 positions"):
        check_lengths(model, 10, 40)
    with pytest.raises(UserError, match="shorten the prompts"):
        check_lengths(model, 60, 1)


def test_model_computes_what_is_not_refused_and_fails_beyond():
    model = small_model("gpt2", max_position_embeddings=48)
    model(torch.zeros(1, 48, dtype=torch.long))
    with pytest.raises(IndexError):
        model(torch.zeros(1, 49, dtype=torch.long))


def test_rotary_model_is_refused_in_training_alone():
    model = small_model("llama", max_position_embeddings=48)
    check_lengths(model, 10, 64)
    with pytest.raises(UserError, match="48 positions"):
        check_lengths(model, 10, 64, trained=True)


def test_only_prompts_that_may_be_too_long_are_encoded():
    model, encoded = small_model("gpt2", max_position_embeddings=48), []

    def encode(prompt):
        encoded.append(prompt)
        return [3] * (len(prompt) // 2)

    check_prompts_fit(model, encode, ["a" * 5, "b" * 40, "c" * 8], 20)
    assert encoded == ["b" * 40]
    with pytest.raises(UserError, match=r"longest prompt \(30 tokens\)"):
        check_prompts_fit(model, encode, ["d" * 60], 20)
