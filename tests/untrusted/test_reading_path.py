"""Generated texts through everything that reads sampled text, from tokens to MLflow, without an exception or a hang."""

import pytest

from tests.untrusted.reading_path import byte_letters, byte_tokenizer, ids_of, run
from tests.untrusted.texts import DIGITS, SURROGATES

FEW, MANY = 200, 500_000


def check(tally, count):
    assert tally.texts >= count
    assert tally.verdicts["right"] > count / 100, "the generator makes right answers too"
    assert tally.verdicts["wrong"] > count / 2
    assert tally.pooled > 0


def test_texts_pass_the_whole_reading_path():
    check(run(FEW, seed=7, batch=FEW, pool_share=0.1), FEW)


@pytest.mark.slow
def test_half_a_million_texts_pass_the_whole_reading_path():
    tally = run(MANY, seed=0)
    check(tally, MANY)
    print(
        f"{tally.texts} texts in {tally.seconds:.0f} s of processor time, "
        f"slowest batch {tally.slowest}, group {tally.slowest_group}"
    )


@pytest.mark.parametrize("text", [*DIGITS, *SURROGATES, "\x00", "\u202e", "plain"])
def test_decoded_tokens_are_text_that_can_be_encoded(text):
    tokenizer = byte_tokenizer()
    letters = {byte: tokenizer.convert_tokens_to_ids(letter) for byte, letter in byte_letters().items()}
    decoded = tokenizer.decode(ids_of(text, letters))
    assert decoded == text if text not in SURROGATES else set(decoded) == {"\ufffd"}
    decoded.encode()
