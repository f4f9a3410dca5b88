"""Near-duplicates against numbers worked out by hand and against the comparison of every pair."""

import random

import numpy as np
import pytest

from stages.curation.duplicates import MISSED, PERMUTATIONS, Duplicates, Finder, bands, grams, similarity


def test_n_grams_by_hand():
    assert len(grams("one two, three", 2)) == 3  # one-two, two-comma, comma-three
    assert len(grams("a b a b a b", 2)) == 2
    assert len(grams("a b", 5)) == 1
    assert len(grams("", 5)) == 0
    assert np.array_equal(grams("The  Sum\nis 4", 2), grams("the sum is 4", 2))
    assert not np.array_equal(grams("the sum is 4", 2), grams("the sum is 5", 2))


def test_similarity_by_hand():
    a, b = grams("one two three four five", 1), grams("one two three six", 1)
    assert similarity(a, b) == similarity(b, a) == 3 / 6
    assert similarity(a, a) == 1.0
    assert similarity(a, grams("", 1)) == 0.0
    assert similarity(grams("", 1), grams("", 1)) == 1.0


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.9, 0.99, 1.0])
def test_the_index_misses_few_pairs_at_the_threshold(threshold):
    number, rows = bands(threshold)
    assert number * rows <= PERMUTATIONS
    assert (1 - threshold**rows) ** number <= MISSED


def family(rng):
    """A text of 80 words and variants of it, in which more and more words are replaced."""
    words = [f"w{rng.randrange(300)}" for _ in range(80)]
    for replaced in (0, 1, 2, 3, 4, 8, 20):
        variant = list(words)
        for place in rng.sample(range(80), replaced):
            variant[place] = f"x{rng.randrange(300)}"
        yield " ".join(variant)


@pytest.mark.parametrize(("threshold", "least"), [(0.5, 60), (0.8, 30), (0.95, 2)])
def test_the_index_finds_what_comparing_every_pair_finds(tmp_path, threshold, least):
    rng = random.Random(1)
    texts = [text for _ in range(30) for text in family(rng)]
    rng.shuffle(texts)
    settings = Duplicates(similarity=threshold, words=3, among="dataset")
    finder = Finder(settings, tmp_path)
    kept: list[np.ndarray] = []
    expected = []
    for text in texts:
        own = grams(text, 3)
        expected.append(any(similarity(own, other) >= threshold for other in kept))
        if not expected[-1]:
            kept.append(own)
    assert [finder.near(text) for text in texts] == expected
    assert least <= sum(expected) <= 180
    assert list(tmp_path.iterdir()) == [], "the n-grams lie in a file that has a name"


def test_among_the_answers_to_one_problem_only(tmp_path):
    finder = Finder(Duplicates(words=2), tmp_path)
    assert [finder.near(text) for text in ("a b c d", "a b c d", "d c b a")] == [False, True, False]
    finder.next_problem()
    assert not finder.near("a b c d")


def test_exactly_at_the_threshold_is_near(tmp_path):
    for among in ("problem", "dataset"):
        finder = Finder(Duplicates(words=1, similarity=0.5, among=among), tmp_path)
        assert [finder.near(text) for text in ("a b c", "a b d", "a e f")] == [False, True, False]
