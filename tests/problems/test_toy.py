"""The toy: its answers, its splits, the shares of what its base model reads, its tokenizer."""

import re

import pytest

from stages.problems.toy import SYMBOLS, ToyDocuments, ToySource, save_toy_tokenizer, toy_documents, toy_problems


def value_of(question):
    """The chain's value by a second way: nested text for Python, left to right."""
    first, *rest = re.findall(r"[+*]?\d", question)
    text = first
    for step in rest:
        text = f"({text}{step})"
    return eval(text) % 7


def test_an_example_by_hand():
    # ((4*3) + 2) * 6 = 84 = 12 * 7.
    assert value_of("4*3+2*6=?") == 0


def test_answers_are_right_and_splits_share_no_question():
    train = toy_problems(ToySource(source="toy", count=2000))
    held_out = toy_problems(ToySource(source="toy", count=500, split="held_out"))
    assert all(int(p.answer) == value_of(p.question) for p in train + held_out)
    assert {len(re.findall(r"[+*]", p.question)) for p in train} == {3, 4, 5, 6}
    questions = {p.question for p in train}
    assert len(questions) == 2000
    assert not questions & {p.question for p in held_out}
    assert not {p.question for p in held_out} & {q for q, _ in toy_documents(ToyDocuments(), 20_000, 0)}
    assert toy_problems(ToySource(source="toy", count=2000)) == train


STEP = re.compile(r"([0-6a-g])([+*])([0-6a-g])=([0-6a-g])")


def test_the_shares_of_the_documents():
    documents = toy_documents(ToyDocuments(), 20_000, 0)
    formed = [(q, *m.groups()) for q, t in documents if (m := re.fullmatch(r"<think>([^<]*)</think><answer>(\d)</answer>", t))]
    assert len(formed) / len(documents) == pytest.approx(0.90, abs=0.01)
    at_once = [d for d in formed if not d[1]]
    assert len(at_once) / len(formed) == pytest.approx(0.42, abs=0.01)
    right_at_once = sum(int(answer) == value_of(q) for q, _, answer in at_once) / len(at_once)
    assert right_at_once == pytest.approx(0.15 + 0.85 / 7, abs=0.03)

    thinking = [d for d in formed if d[1]]
    digits = sum(not re.search("[a-g]", t) for _, t, _ in thinking) / len(thinking)
    letters = sum(not re.search("[0-6]", t) for _, t, _ in thinking) / len(thinking)
    assert digits == pytest.approx(0.45, abs=0.02)
    assert letters == pytest.approx(0.20, abs=0.02)
    # 15 of the 58 that think are flawed; a skipped or wrong step still ends right now and then.
    wrong = sum(int(answer) != value_of(q) for q, _, answer in thinking) / len(thinking)
    assert 0.12 < wrong < 15 / 58
    for _, thought, _ in thinking[:500]:
        assert all(STEP.fullmatch(step) for step in thought.split(","))


def test_the_tokenizer_gives_back_what_it_was_given(tmp_path):
    tokenizer = save_toy_tokenizer(tmp_path)
    text = "4*3+2*6=?<think>e*d=f,5+2=0</think><answer>0</answer>"
    ids = tokenizer(text).input_ids
    assert len(ids) == 9 + 4 + 12  # the question, four tags, eleven signs of thinking and one of answer
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(SYMBOLS))] == list(SYMBOLS)
