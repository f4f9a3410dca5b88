"""Text to tokens and back, with tokenizers of every convention; and what comes of it in each engine."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.contract.errors import UserError
from stages.problems.episode import Problem
from stages.problems.templates import Template
from stages.rewards.score import Rewards, score
from stages.rollout.groups import sample_groups
from stages.rollout.protocol import Request, Sampling
from stages.rollout.token_text import TokenText, end_tokens
from stages.rollout.torch_engine import Finishing, TorchRollout, load_model, load_tokenizer
from tests.doubles.scripted_model import answering, scripted_model, toy_tokenizer
from tests.tokenizers_by_kind import TAGS, byte_level, saved, sentence_piece, word_piece

ANSWER = "<think>\nso x = -1 , 2</think> <answer>5!</answer>"
KINDS = {
    "byte_level": byte_level,
    "special_tags": lambda: byte_level(special=TAGS),
    "ordinary_added_tags": lambda: byte_level(ordinary=TAGS),
    "appended_end": lambda: byte_level(append=True),
    "cleaned_up": lambda: byte_level(clean_up_tokenization_spaces=True),
    "ordinary_padding": lambda: byte_level(pad_token="!"),
    "tag_as_end": lambda: byte_level(special=TAGS, eos_token="</answer>"),
    "padding_is_end": lambda: byte_level(pad_token="</s>"),
    "sentence_piece": sentence_piece,
}


@pytest.fixture(params=KINDS)
def text(request):
    return TokenText(KINDS[request.param]())


def test_an_answer_is_read_back_as_it_was_written(text):
    ids = text.continuations([ANSWER])[0]
    assert text.decode(ids) == ANSWER
    end = text.tokenizer.eos_token_id
    assert text.decode([*ids, end]).removesuffix("</answer>" * (text.tokenizer.eos_token in TAGS)) == ANSWER


@settings(max_examples=30)
@given(st.text(alphabet="<>/thinkanswer 15!,.-\n", max_size=30), st.sampled_from(sorted(KINDS)))
def test_texts_behind_a_prompt_are_read_back_exactly(written, kind):
    text = TokenText(KINDS[kind]())
    assert text.decode(text.continuations([written])[0]) == written


def test_decoding_drops_end_padding_and_begin_tokens_wherever_they_stand():
    tokenizer = byte_level(special=(*TAGS, "<|tool|>"), append=True)
    text = TokenText(tokenizer, [1])
    assert text.dropped == {0, 1, 2}
    tool = tokenizer.convert_tokens_to_ids("<|tool|>")
    five = text.continuations(["5"])[0]
    assert text.decode([2, *five, 0, tool, *five, 1, 0, 0]) == "5<|tool|>5"


def test_decoding_drops_every_declared_end_token_but_no_ordinary_text():
    tokenizer = byte_level(special=("<|im_end|>",))
    digit, turn = text_ids(tokenizer, "3")[0], tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = TokenText(tokenizer, [turn, digit])
    assert text.decode([*text_ids(tokenizer, "1"), digit, turn]) == "13"


def text_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_ids_without_a_token_have_no_text():
    text = TokenText(byte_level())
    assert text.decode([10**6, *text.continuations(["5"])[0], 10**6 + 1]) == "5"


def test_an_ordinary_character_declared_as_padding_stays_in_answers():
    assert "!" in TokenText(byte_level(pad_token="!")).decode(text_ids(byte_level(), "5! = 120"))


def test_spaces_are_not_cleaned_up():
    """transformers cleans up what is no BPE: ` ,` became `,`."""
    tokenizer = word_piece()
    assert tokenizer.decode(text_ids(tokenizer, "1 , 2")) == "1, 2"
    assert TokenText(tokenizer).decode(text_ids(tokenizer, "1 , 2")) == "1 , 2"


def test_a_prompt_keeps_what_is_put_before_it_and_loses_what_is_appended():
    text = TokenText(byte_level(append=True))
    bare = text_ids(text.tokenizer, "1+1=?")
    assert text.tokenizer("1+1=?").input_ids == [2, *bare, 1]
    assert text.prompt("1+1=?") == [2, *bare]
    assert text.prompts(["", "1+1=?"]) == [[2], [2, *bare]]
    # An end token that is part of the prompt stays: the end of an earlier turn.
    assert text.prompt("Hi</s>") == [2, *text_ids(text.tokenizer, "Hi"), 1]
    assert TokenText(word_piece()).prompt("a") == word_piece()("a").input_ids[:-1]


def test_a_prompt_that_brings_its_begin_token_along_has_one():
    text = TokenText(byte_level(append=True))
    assert text.prompt("<s>a") == text.prompt("a")


def test_a_tokenizer_saved_with_truncation_and_padding_reads_whole_prompts(tmp_path):
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=16)
    tokenizer.save_pretrained(tmp_path)
    text = TokenText(load_tokenizer(tmp_path))
    assert [len(ids) for ids in text.prompts(["a", "b" * 40])] == [1, 40]
    assert [len(ids) for ids in text.completions(["a", "b" * 40])] == [2, 41]


@pytest.mark.parametrize("written", ["5", "5</s>", "5</s>\n", "5</s></s>", "5<|im_end|>\n", "5<|im_end|>\n</s>"])
def test_a_completion_ends_with_exactly_one_end_token(written):
    tokenizer = byte_level(special=("<|im_end|>",))
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = TokenText(tokenizer, [turn])
    ids = text.completions([written])[0]
    assert ids[:-1] == text_ids(tokenizer, "5")
    assert ids[-1] == (turn if "im_end" in written else 1)


def test_a_completion_keeps_a_tag_that_is_the_end_token():
    text = TokenText(byte_level(special=TAGS, eos_token="</answer>"))
    ids = text.completions(["<answer>5</answer>"])[0]
    assert ids == text.continuations(["<answer>5</answer>"])[0]
    assert ids.count(text.tokenizer.eos_token_id) == 1


def test_a_completion_does_not_begin_with_a_space_that_is_not_there():
    """SentencePiece's models put a space before every text: prompt + completion was not what the data says."""
    text = TokenText(sentence_piece())
    prompt, answer = text.prompt("Q: 1+1=?\n"), text.completions(["5"])[0]
    assert text.decode([*prompt, *answer]).removeprefix(" ") == "Q: 1+1=?\n5"
    assert text.tokenizer("5", add_special_tokens=False).input_ids != answer[:-1]
    # And a space that is there comes back.
    assert text.decode(text.continuations([" 5"])[0]) == " 5"


def test_a_sentence_piece_tokenizer_without_newlines_has_another_anchor():
    text = TokenText(sentence_piece(newline=False))
    assert text.anchor[0] == "."
    assert [text.decode(text.continuations([written])[0]) for written in ("5", " 5", "..")] == ["5", " 5", ".."]


def test_no_end_token_is_a_mistake():
    with pytest.raises(UserError, match="no end token"):
        TokenText(byte_level(eos_token=None)).completions(["5"])


def test_end_tokens_are_of_all_three_places_and_none_is_negative():
    declared = [SimpleNamespace(eos_token_id=item) for item in ([1, 5], -1, None)]
    model = SimpleNamespace(generation_config=declared[0], config=declared[1])
    assert end_tokens(model, declared[2]) == {1, 5}
    assert end_tokens(SimpleNamespace(generation_config=declared[2], config=declared[2]), SimpleNamespace(eos_token_id=7)) == {
        7
    }


# The engines.


@pytest.fixture(scope="module")
def special(tmp_path_factory):
    """A model that answers `<think>a</think><answer>3</answer>` to every question, whose tags are special tokens."""
    folder = tmp_path_factory.mktemp("special")
    return scripted_model(folder, toy_tokenizer(folder, special=TAGS), answering("3"))


PROBLEMS = [Problem("p1", "1+2=?", "3", "s"), Problem("p2", "2+2=?", "4", "s")]


def accuracy(rollout):
    groups = sample_groups(
        rollout, PROBLEMS, Template(name="question"), Sampling(max_tokens=12), 2, seed=0, purpose="t", step=0
    )
    episodes = [episode for group in groups for episode in group.episodes]
    assert {episode.text for episode in episodes} == {"<think>a</think><answer>3</answer>"}
    score(Rewards(verifier="exact"), episodes, max_tokens=12, key="t")
    assert {episode.scored.parts["format"] for episode in episodes} == {1.0}
    return sum(episode.scored.verdict == "right" for episode in episodes) / len(episodes)


@pytest.mark.parametrize("decoder", ["torch", "auto"])
def test_special_tags_are_seen_by_the_rewards(special, decoder):
    assert accuracy(TorchRollout(load_model(special), load_tokenizer(special), decoder=decoder)) == 0.5


def test_special_tags_are_seen_by_the_rewards_with_vllm(special, tmp_path):
    from stages.rollout.vllm.engine import VllmRollout

    tokenizer = load_tokenizer(special)
    ids = TokenText(tokenizer).completions(["<think>a</think><answer>3</answer>"])[0]
    replies = [
        {"prompt": p, "sample": s, "ids": ids, "logprobs": [0.0] * len(ids), "finish": "stop"} for p in (0, 1) for s in (0, 1)
    ]
    rollout = VllmRollout.__new__(VllmRollout)  # without its process
    rollout.tokenizer, rollout.end_tokens, rollout.text = tokenizer, frozenset({1}), TokenText(tokenizer, {1})
    rollout._process = SimpleNamespace(ask=lambda _: replies, ready=lambda: {"max_model_length": 99})
    assert accuracy(rollout) == 0.5


def test_special_tags_are_seen_by_lm_eval(special, tmp_path):
    from lm_eval.api.instance import Instance

    from stages.evals.lm import RolloutLM

    rollout = TorchRollout(load_model(special), load_tokenizer(special))
    lm = RolloutLM(rollout, tmp_path, seed=0, problems={})
    ask = {"until": ["</think>"], "max_gen_toks": 12}
    request = Instance("generate_until", {}, ("1+2=?", ask), 0, metadata=("task", 0, 1))
    assert lm.generate_until([request]) == ["<think>a"]  # a special token can be a stop text, too
    assert [e.finish for e in lm.groups["task:0:0"].episodes] == ["stop"]


def test_a_stop_text_of_special_tokens_ends_an_answer(special):
    rollout = TorchRollout(load_model(special), load_tokenizer(special))
    sampling = Sampling(max_tokens=12, stop=("</think>",))
    answer = rollout.sample([Request("a", rollout.encode("1+2=?"), 1)], sampling, seed=0, purpose="t", step=0)[0][0]
    assert (answer.text, answer.finish) == ("<think>a</think>", "stop")


def test_a_long_stop_text_ends_an_answer(tmp_path):
    """One byte a token: a stop text of 30 bytes is 30 tokens, more than were looked back over."""
    tokenizer = byte_level()
    stop = "abcdefghijklmnopqrstuvwxyzABCDEFGH"
    script = {a: [b] for a, b in zip("?" + stop, stop + "?", strict=True)}
    folder = scripted_model(tmp_path, tokenizer, script)
    rollout = TorchRollout(load_model(folder), load_tokenizer(folder))
    sampling = Sampling(max_tokens=100, stop=(stop,))
    answer = rollout.sample([Request("a", rollout.encode("1+2=?"), 1)], sampling, seed=0, purpose="t", step=0)[0][0]
    assert (answer.text, answer.finish) == (stop, "stop")


def test_a_space_at_the_start_of_a_tail_is_not_lost():
    text = TokenText(sentence_piece())
    assert text.decode(text.continuations(["ab ok"])[0][-3:]).endswith(" ok")
    assert Finishing(text, (" ",))[text.continuations(["b c"])[0][1]]


def test_every_engine_encodes_prompts_without_an_appended_end_token(tmp_path):
    folder = saved(byte_level(append=True), tmp_path)
    rollout = TorchRollout(load_model(folder), load_tokenizer(folder))
    assert rollout.encode("1+1=?")[-1] == text_ids(rollout.tokenizer, "?")[0]
    completion = rollout.sample([Request("a", rollout.encode("a"), 1)], Sampling(max_tokens=3), seed=0, purpose="t", step=0)
    assert len(completion[0][0].ids) > 0


def test_likelihoods_are_of_texts_without_an_appended_end_token(tmp_path):
    from stages.evals.lm import RolloutLM

    folder = saved(byte_level(append=True), tmp_path)
    rollout = TorchRollout(load_model(folder), load_tokenizer(folder))
    lm = RolloutLM(rollout, tmp_path, seed=0, problems={})
    context, continuation = lm._encode_pair("1+1=", " 2")
    assert context == [2, *text_ids(rollout.tokenizer, "1+1=")]
    assert continuation == text_ids(rollout.tokenizer, " 2")
