"""The transformers fallback: which mode a model is decoded in, and that no mode changes what is drawn."""

import warnings
from types import MethodType

import pytest
import torch

from stages.contract.errors import UserError
from stages.problems.toy import save_toy_tokenizer
from stages.rollout.decoding import transformers_batch
from stages.rollout.decoding.mode import choose_mode
from stages.rollout.decoding.transformers_batch import MODES, TransformersBatch, UnsupportedByModel, own_logits
from stages.rollout.protocol import Request, Sampling
from stages.rollout.torch_engine import TorchRollout
from tests.architectures.build import VOCABULARY, build

PADDED, SHARED, ROWS, NONE = MODES
PROMPTS = {"a": (6, 20, 7, 21, 33), "b": (8, 9), "c": (9, 20, 10, 21, 11), "d": (40, 41)}
SAMPLING = Sampling(max_tokens=14)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_toy_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def engine(model, tokenizer, mode=None, tokens=None, decoder="auto"):
    rollout = TorchRollout(model, tokenizer, tokens, decoder)
    rollout.end_tokens = frozenset(range(0, VOCABULARY, 10))
    rollout._mode = mode
    return rollout


def sample(rollout, requests, sampling=SAMPLING, done=None):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="sampling takes the slow path")
        return rollout.sample(requests, sampling, seed=0, purpose="test", step=0, done=done)


def requests(samples=5):
    return [Request(key, ids, samples) for key, ids in PROMPTS.items()]


def ids(groups):
    return [[answer.ids for answer in group] for group in groups]


@pytest.fixture(scope="module")
def neox():
    return build("GPTNeoXForCausalLM")


# --- what is drawn ---


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_mode_draws_the_same_answers(mode, neox, tokenizer):
    expected = sample(engine(neox, tokenizer, PADDED), requests())
    assert len({len(answer.ids) for group in expected for answer in group}) > 3
    for tokens in (None, 40):  # all together, and two rows at a time
        groups = sample(engine(neox, tokenizer, mode, tokens), requests())
        assert ids(groups) == ids(expected)
        for group, others in zip(groups, expected, strict=True):
            for answer, other in zip(group, others, strict=True):
                torch.testing.assert_close(torch.tensor(answer.logprobs), torch.tensor(other.logprobs), rtol=0, atol=1e-5)
                assert answer.finish == other.finish == ("stop" if answer.ids[-1] % 10 == 0 else "length")


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("DeepseekV3ForCausalLM", PADDED),
        ("Lfm2ForCausalLM", PADDED),
        ("BartForCausalLM", SHARED),
        ("MiniMaxForCausalLM", ROWS),
        ("RwkvForCausalLM", NONE),
    ],
)
def test_an_answer_does_not_depend_on_who_shares_its_batch(name, mode, tokenizer):
    model = build(name)
    rollout = engine(model, tokenizer)
    together = sample(rollout, requests())
    assert rollout._mode == mode
    (alone,) = sample(rollout, [Request("c", PROMPTS["c"], samples=2, first_sample=3)])
    assert ids([alone]) == ids([together[2][3:]])
    assert ids([together[1]]) != ids([together[3]])


def test_decoder_transformers_forces_the_fallback_which_draws_as_the_fast_decoder(tokenizer):
    model = build("LlamaForCausalLM")
    expected = sample(engine(model, tokenizer), requests())
    rollout = engine(model, tokenizer, decoder="transformers")
    with pytest.warns(UserWarning, match="rollout.decoder is `transformers`; it runs padded batches with the model's cache"):
        groups = rollout.sample(requests(), SAMPLING, seed=0, purpose="test", step=0)
    assert ids(groups) == ids(expected)


def test_each_request_is_done_once_when_its_last_answer_is(neox, tokenizer):
    calls = []
    groups = sample(
        engine(neox, tokenizer, tokens=60), requests(), done=lambda number, answers: calls.append((number, answers))
    )
    assert sorted(number for number, _ in calls) == [0, 1, 2, 3]
    assert all(answers is groups[number] for number, answers in calls)


# --- what is computed ---


def test_equal_prompts_are_prefilled_once_and_ended_rows_leave(neox, tokenizer):
    with counted_calls(neox) as calls:
        groups = sample(engine(neox, tokenizer, SHARED), [Request("a", PROMPTS["a"], 16)])
    assert calls[0] == (1, 5)
    rows = [rows for rows, width in calls[1:]]
    assert rows[0] <= 16 and all(width == 1 for _, width in calls[1:])
    assert rows == sorted(rows, reverse=True)
    longer = [sum(len(answer.ids) > t + 1 for answer in groups[0]) for t in range(len(rows))]
    assert all(least <= count <= least * 8 / 7 + 1 for least, count in zip(longer, rows, strict=True))


def test_a_batch_of_unpadded_rows_never_holds_two_prompt_lengths(neox, tokenizer):
    with counted_calls(neox) as calls:
        sample(engine(neox, tokenizer, SHARED), requests())
    assert sorted(shape for shape in calls if shape[1] > 1) == [(2, 2), (2, 5)]


class counted_calls:  # noqa: N801  reads as a function
    """Shapes of the token ids of a model's calls."""

    def __init__(self, model):
        self.handle = model.register_forward_pre_hook(self.note, with_kwargs=True)
        self.calls = []

    def note(self, module, positional, options):
        self.calls.append(tuple(options["input_ids"].shape))

    def __enter__(self):
        return self.calls

    def __exit__(self, *error):
        self.handle.remove()


# --- the choice ---


def test_probe_finds_what_padding_changes(neox, monkeypatch):
    assert choose_mode(neox) == PADDED
    forward = neox.forward

    def deaf(self, *positional, attention_mask=None, **options):
        return forward(*positional, **options)

    monkeypatch.setattr(neox, "forward", MethodType(deaf, neox))
    signature(monkeypatch, "position_ids", "use_cache", "logits_to_keep")
    assert choose_mode(neox) == SHARED


@pytest.mark.parametrize("share", [1e-2, 1.0])
def test_probe_finds_a_cache_that_loses_something(share, neox, monkeypatch):
    """Values of one position of the cache are made smaller after the prompt."""
    forward = neox.forward

    def lossy(self, *positional, **options):
        output = forward(*positional, **options)
        if output.past_key_values is not None and options["input_ids"].shape[1] > 1:
            output.past_key_values.layers[1].values[:, :, -2] *= 1 - share
        return output

    monkeypatch.setattr(neox, "forward", MethodType(lossy, neox))
    signature(monkeypatch, "attention_mask", "position_ids", "use_cache", "logits_to_keep")
    assert choose_mode(neox) == NONE


def signature(monkeypatch, *names):
    monkeypatch.setattr(transformers_batch, "parameters_of", lambda _: frozenset(names))


def test_probe_in_16_bits_takes_the_cache_and_finds_what_padding_changes(monkeypatch):
    model = build("GPTNeoXForCausalLM").bfloat16()
    assert choose_mode(model) == PADDED
    forward = model.forward

    def deaf(self, *positional, attention_mask=None, **options):
        return forward(*positional, **options)

    monkeypatch.setattr(model, "forward", MethodType(deaf, model))
    signature(monkeypatch, "position_ids", "use_cache", "logits_to_keep")
    assert choose_mode(model) == SHARED


def test_a_bidirectional_model_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"^model: `BertLMHeadModel` is not causal: later tokens change .* by [0-9.]+ nats; "):
        choose_mode(build("BertLMHeadModel", is_decoder=False))


def test_a_model_that_reads_no_text_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"^model: `MusicgenForCausalLM` cannot read a text alone: RuntimeError: shape"):
        choose_mode(build("MusicgenForCausalLM"))


def test_logits_that_are_no_numbers_are_refused(neox):
    model = build("GPTNeoXForCausalLM")
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(UserError, match="GPTNeoXForCausalLM"):
        choose_mode(model)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt(), MemoryError()])
def test_running_out_of_memory_is_no_property_of_a_mode(error, neox, monkeypatch):
    def failing(self, *positional, **options):
        raise error

    monkeypatch.setattr(neox, "forward", MethodType(failing, neox))
    with pytest.raises(type(error)):
        choose_mode(neox)


def test_a_fault_of_ours_is_not_taken_for_a_models(neox, monkeypatch):
    monkeypatch.setattr(TransformersBatch, "keep", lambda self, rows: rows.no_such_name)
    with pytest.raises(AttributeError, match="no_such_name"):
        choose_mode(neox)


def test_a_cache_without_rows_is_unsupported_and_not_decoded():
    model = build("RwkvForCausalLM")
    with torch.inference_mode(), pytest.raises(UnsupportedByModel, match="no rows to choose from"):
        TransformersBatch(model, [[5, 6, 7]], [0, 0], SHARED)


def test_a_models_own_error_ends_sampling_and_leaves_it_in_training_mode(neox, tokenizer, monkeypatch):
    monkeypatch.setattr("stages.rollout.torch_engine.choose_mode", lambda *_: 1 / 0)
    neox.train()
    with pytest.raises(ZeroDivisionError):
        sample(engine(neox, tokenizer), requests())
    assert neox.training
    neox.eval()


# --- positions ---


@pytest.mark.parametrize(
    ("name", "fields"), [("GPT2LMHeadModel", {"n_positions": 48}), ("OPTForCausalLM", {"max_position_embeddings": 48})]
)
def test_a_text_longer_than_learned_positions_is_refused_before_anything_is_computed(name, fields, tokenizer):
    model = build(name, **fields)
    with counted_calls(model) as calls, pytest.raises(UserError) as refusal:
        sample(engine(model, tokenizer), requests(), Sampling(max_tokens=64))
    assert calls == []
    assert str(refusal.value).startswith(
        f"sampling.max_tokens: `{name}` reads 48 tokens at most, not a prompt of 5 with 64 more"
    )


def test_answers_may_fill_learned_positions_to_the_last(tokenizer):
    model = build("GPT2LMHeadModel", n_positions=48)
    rollout = engine(model, tokenizer)
    rollout.end_tokens = frozenset()
    (group,) = sample(rollout, [Request("a", PROMPTS["a"], 2)], Sampling(max_tokens=44))
    for answer in group:
        assert len(answer.ids) == 44
        with torch.no_grad():
            logits = own_logits(model, torch.tensor([[*PROMPTS["a"], *answer.ids[:-1]]]))[0, 4:]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(answer.ids)[:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, rtol=0, atol=1e-4)
