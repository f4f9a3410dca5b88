"""Packed texts against the plain reference: transformers' own forward, one text at a time."""

import functools
import itertools
import random

import pytest
import torch

from stages.contract.errors import UserError
from stages.engine import token_logp
from stages.engine.packing import attention
from stages.engine.packing.attention import Family
from stages.engine.packing.pack import Text, alone, micro_batches, pack
from stages.engine.scorer import TokenScorer, TokenValueScorer, ValueScorer
from stages.engine.self_check import check_texts, training_path
from tests.conftest import tiny_llama


def texts(count=7, seed=0):
    rng = random.Random(seed)
    prompts = [[rng.randrange(32) for _ in range(rng.randrange(1, 9))] for _ in range(3)]
    return [
        Text(prompts[i % 3 if i < 3 else i * 3 // count], [rng.randrange(32) for _ in range(rng.randrange(1, 12))])
        for i in range(count)
    ]


def grid():
    """Several prompts of like length with about as many answers (one family), others alone, one answer of a single token."""
    rng = random.Random(1)
    some = [[rng.randrange(32) for _ in range(5)] for _ in range(3)]
    return [
        *[Text(p, [rng.randrange(32) for _ in range(n)]) for p in some for n in (4, 9, 2)],
        *[Text([9, 0, 4, 11], [rng.randrange(32) for _ in range(n)]) for n in (7, 3, 12, 5)],
        Text([3, 4], [5]),
        Text([3, 4], [6]),
        Text([7] * 9, [1, 2, 3]),
    ]


def copies():
    """Answers that are the same token for token, side by side and apart; the same behind another prompt."""
    first, second = [[5, 6, 7, 8], [9, 3]]
    long, short = [4, 4, 2, 1], [3]
    answers = [(first, long), (first, short), (first, long), (first, [4, 4, 2]), (first, short), (first, long)]
    return [Text(p, a) for p, a in [*answers, (second, long), (second, long), (second, [7, 7]), (first, long)]]


def prefixed():
    """Prompts of unlike length that begin with the same twenty tokens: with several answers, with one, with copies of one."""
    rng = random.Random(2)
    head = [rng.randrange(32) for _ in range(20)]
    ends = [[rng.randrange(32) for _ in range(n)] for n in (4, 1, 5, 9)]
    counts = (3, 4, 1, 2)
    several = [
        Text([*head, *end], [rng.randrange(32) for _ in range(rng.randrange(1, 9))])
        for end, count in zip(ends, counts, strict=True)
        for _ in range(count)
    ]
    return [*several, *[Text([*head, 31, 2], [8, 7, 6])] * 2]


def plain_logp(model, text, temperature=1.0):
    """Log-probabilities of the completion by transformers' forward pass over one unpadded sequence."""
    ids = torch.tensor([[*text.prompt, *text.completion]])
    logits = model(input_ids=ids).logits[0] / temperature
    logp = torch.log_softmax(logits, -1)
    start = len(text.prompt)
    return torch.stack([logp[start + i - 1, token] for i, token in enumerate(text.completion)])


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


ITEMS = {"texts": texts(), "grid": grid(), "copies": copies(), "prefixed": prefixed()}


@functools.cache
def one_at_a_time(kind, temperature):
    """Weights of the texts, the gradient of their weighted log-probabilities, and these, by the plain reference."""
    # The model's pad id (0) is a token of the texts: its embedding must learn too.
    model, items = tiny_llama(), ITEMS[kind]
    weights = torch.linspace(-1, 1, len(items), dtype=torch.float64)
    model.get_input_embeddings().padding_idx = None
    logps = [plain_logp(model, item, temperature) for item in items]
    sum(weight * logp.sum() for weight, logp in zip(weights, logps, strict=True)).backward()
    return weights, flat_gradient(model), [logp.detach() for logp in logps]


@pytest.mark.parametrize("work", ["joined", "masked"])
@pytest.mark.parametrize(("temperature", "micro"), [(0.7, 1), (0.7, 20), (0.7, 50), (0.7, 10_000), (1.0, 20)])
@pytest.mark.parametrize("kind", ITEMS)
def test_log_probabilities_and_gradient_equal_one_text_at_a_time(work, micro, temperature, kind, monkeypatch):
    items, (weights, expected, expected_logp) = ITEMS[kind], one_at_a_time(kind, temperature)
    if work == "masked":
        monkeypatch.setattr(attention, "_joined", attention._masked)
    model = tiny_llama()
    assert model.get_input_embeddings().padding_idx == 0
    scorer = TokenScorer(model)
    seen = []
    for packed in micro_batches(items, micro):
        logp, _ = scorer(packed, temperature)
        (weights[packed.owner] * logp.double()).sum().backward()
        for owner in packed.owner.unique().tolist():
            torch.testing.assert_close(logp[packed.owner == owner].double(), expected_logp[owner], rtol=0, atol=1e-5)
            seen.append(owner)
    assert sorted(seen) == list(range(len(items)))
    found = flat_gradient(model)
    # The head's softmax is float32 by design, everything else float64 here.
    assert torch.linalg.norm(found - expected) / torch.linalg.norm(expected) < 1e-5


def test_the_gradient_equals_that_of_padded_rows():
    """A batch of right-padded rows through transformers' forward, a mask, full logits: what most trainers do."""
    items, model = [*texts(), *grid()], tiny_llama()
    model.get_input_embeddings().padding_idx = None
    weights = torch.linspace(-1, 1, len(items), dtype=torch.float64)
    width = max(len(item.prompt) + len(item.completion) for item in items)
    whole = [[*item.prompt, *item.completion] for item in items]
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in whole])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in whole])
    logp = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    for row, (item, text) in enumerate(zip(items, whole, strict=True)):
        (weights[row] * logp[row, len(item.prompt) - 1 : len(text) - 1].sum()).backward(retain_graph=True)
    expected = flat_gradient(model)

    model = tiny_llama()
    scorer = TokenScorer(model)
    for packed in micro_batches(items, 40):
        found, _ = scorer(packed)
        (weights[packed.owner] * found.double()).sum().backward()
    difference = flat_gradient(model) - expected
    assert torch.linalg.norm(difference) / torch.linalg.norm(expected) < 1e-5


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("repeats", [1, 3])
def test_the_joined_softmax_is_exact_in_float64(repeats, behind):
    """Output and all five gradients against the public function with a mask; the log-sum-exps are what is at stake.

    behind: the second prompt is shorter than the first, and what lies in its empty place is not looked at.
    """
    torch.manual_seed(0)
    prompts, answers, longest, read, heads, size = 2, 3, 5, 4, 2, 8
    shapes = [
        (prompts, answers, longest, heads * repeats, size),
        *[(prompts, answers, longest, heads, size)] * 2,
        *[(prompts, read, heads, size)] * 2,
    ]
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weight = torch.randn(shapes[0], dtype=torch.float64)
    hidden = torch.tensor([[False] * 4, [False, False, False, True]]) if behind else None
    found = {}
    for name, work in (("joined", attention._joined), ("masked", attention._masked)):
        out = work(*given, hidden, 0.3)
        found[name] = [out, *torch.autograd.grad((out * weight).sum(), given)]
    for mine, theirs in zip(found["joined"], found["masked"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    if behind:
        for gradient in found["joined"][-2:]:
            assert gradient[1, 3].abs().max() == 0 < gradient[1, 2].abs().max()


@pytest.mark.parametrize("chunks", [2, 7, 500])
def test_chunked_head_gives_the_same_gradient(chunks):
    gradients = []
    for count in (1, chunks):  # 500: more chunks than tokens, as a rank with little work has
        model = tiny_llama()
        packed = pack(texts(), range(7))
        packed.chunks = count
        logp, _ = TokenScorer(model)(packed)
        logp.sum().backward()
        gradients.append(flat_gradient(model))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("entries", [1, 70, 10_000])
def test_token_log_probabilities_equal_the_plain_ones(entries, monkeypatch):
    monkeypatch.setitem(token_logp.ENTRIES, "cpu", entries)
    torch.manual_seed(0)
    logits, targets, weight = torch.randn(9, 33) * 5, torch.randint(33, (9,)), torch.randn(9)
    plain = logits.double().requires_grad_()
    logp = torch.log_softmax(plain / 0.7, -1)
    expected = logp.gather(-1, targets[:, None]).squeeze(-1)
    (expected * weight).sum().backward()
    leaf = logits.clone().requires_grad_()
    found, entropy = token_logp.token_logp(leaf * 1.0, targets, 0.7)
    (found * weight).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(logp.exp() * logp).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), plain.grad, rtol=1e-5, atol=1e-6)
    assert not entropy.requires_grad


def test_model_with_other_attention_than_sdpa_is_not_packed():
    model = tiny_llama()
    model.config._attn_implementation = "eager"
    assert training_path(model, check_texts(model, [[3, 4, 5], [6, 7]])) == "rows"
    assert model.config._attn_implementation == "eager"


def test_a_model_that_drops_the_layout_is_refused(monkeypatch):
    model = tiny_llama()
    scorer = TokenScorer(model)
    decoder, forward = model.get_decoder(), model.get_decoder().forward
    monkeypatch.setattr(decoder, "forward", lambda packed_layout, **given: forward(**given))
    with pytest.raises(UserError, match="packed texts"):
        scorer(pack(texts(), range(7)))


def test_a_scorer_leaves_the_model_as_good_for_plain_texts():
    model, ids = tiny_llama(), torch.tensor([[3, 4, 5, 6]])
    before = model(input_ids=ids, attention_mask=torch.tensor([[0, 1, 1, 1]])).logits
    TokenScorer(model)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=torch.tensor([[0, 1, 1, 1]])).logits, before)


def test_a_text_longer_than_the_window_is_refused():
    with pytest.raises(UserError, match="130 tokens is longer than the model's window of 128"):
        TokenScorer(tiny_llama())(alone([Text([3], [4] * 130)])[0])


def test_a_prompt_stands_once_for_its_answers_and_the_last_token_is_not_computed():
    packed = pack([Text([5, 6], [7, 8, 1]), Text([5, 6], [9, 1])], [3, 8])
    assert packed.tokens.tolist() == [5, 6, 7, 8, 9]
    assert packed.positions.tolist() == [0, 1, 2, 3, 2]
    assert packed.targets.tolist() == [7, 8, 1, 9, 1]
    assert packed.predictor.tolist() == [1, 2, 3, 1, 4]
    assert packed.owner.tolist() == [3, 3, 3, 8, 8]
    # A prompt of two with two answers of at most two: the second answer has an empty place at its end.
    assert packed.layout.families == [Family(1, 2, ((2, 2),))]
    assert packed.layout.token.tolist() == [0, 1, 2, 3, 4, 0]
    assert packed.layout.place.tolist() == [0, 1, 2, 3, 4]
    assert packed.layout.empty.tolist() == [5]


def test_the_same_answer_to_a_prompt_stands_once_and_counts_for_each():
    packed = pack([Text([5, 6], [7, 8]), Text([5, 6], [7, 8]), Text([5, 6], [9, 8]), Text([5], [9, 8])], [2, 0, 1, 3])
    assert packed.tokens.tolist() == [5, 6, 7, 9, 5, 9]
    assert packed.predictor.tolist() == [1, 2, 1, 3, 4, 5]
    assert packed.targets.tolist() == [7, 8, 9, 8, 9, 8]
    assert packed.spread.tolist() == [0, 1, 0, 1, 2, 3, 4, 5]
    assert packed.owner.tolist() == [2, 2, 0, 0, 1, 1, 3, 3]
    assert pack(texts(), range(7)).spread is None
    # Copies are brought together: of ten answers six are computed, in one part; cut apart, both parts compute theirs.
    (whole,) = micro_batches(copies(), 1000)
    assert whole.owner.unique_consecutive().tolist() == [0, 2, 5, 1, 4, 3, 6, 7, 8, 9]
    assert whole.size == (4 + 3 + 0 + 2) + (2 + 3 + 1) + (4 + 3)
    (first,), (second,) = [micro_batches([Text([3], [7] * 11)] * 3, 1000, rank, 2) for rank in range(2)]
    assert (first.size, second.size) == (11, 11)


def test_what_all_prompts_begin_with_stands_once():
    head = [*range(16)]
    some = [Text([*head, 20, 21], [7, 8, 9]), Text([*head, 20, 21], [6, 5]), Text([*head, 22], [4, 3])]
    (packed,) = micro_batches(some, 1000)
    assert packed.tokens.tolist() == [*head, 20, 21, 7, 8, 6, 22, 4]
    assert packed.positions.tolist() == [*range(16), 16, 17, 18, 19, 18, 16, 17]
    assert packed.predictor.tolist() == [17, 18, 19, 17, 20, 21, 22]
    assert packed.layout.prefix == 16
    # One text alone behind the prefix, and one prompt of two tokens with two answers.
    assert packed.layout.families == [Family(1, 2), Family(1, 2, ((2, 2),))]
    assert packed.layout.token.tolist()[:16] == head
    # Not where a prompt is nothing but what all begin with, where it is short, where it is half of a micro-batch, or of one.
    less = [*some, Text(head, [4, 3])]
    for items, tokens in ((less, 1000), ([Text(t.prompt[1:], t.completion) for t in some], 1000), (some, 31), (some[:2], 1000)):
        assert all(packed.layout.prefix == 0 for packed in micro_batches(items, tokens))
    # Three parts: each computes the sixteen.
    found = [packed for rank in range(3) for packed in micro_batches(prefixed(), 45, rank, 3)]
    assert [packed.layout.prefix for packed in found] == [20, 20, 20]
    assert max(packed.size for packed in found) <= 45


def test_a_shared_beginning_neither_crowds_a_micro_batch_nor_pads_it():
    head = [*range(20)]
    # Forty prompts of 22 tokens that end in two of their own, and answers of one computed token: 20 and 40 × 3 tokens.
    many = [Text([*head, n % 32, n // 32], [7, 8]) for n in range(40)]
    found = micro_batches(many, 200)
    # They fit into one micro-batch of 200, but a text counts for 23 where attention holds what all begin with for each: 920.
    assert sorted(len(packed.owner.unique()) for packed in found) == [13, 13, 14]
    assert all(packed.layout.prefix == 20 for packed in found)
    # Of like length with what they begin with, not without it: 2 and 5 tokens behind it are worked on apart.
    (packed,) = micro_batches([Text([*head, 1], [7, 8]), Text([*head, 2, 3, 4], [7, 8, 9])], 200)
    assert packed.layout.families == [Family(1, 5), Family(1, 2)]
    assert len(packed.layout.empty) == 0


@pytest.mark.parametrize("scorer", [ValueScorer, TokenValueScorer])
def test_what_is_said_of_a_copy_is_what_is_said_of_the_first(scorer):
    model = scorer(tiny_llama())
    torch.nn.init.normal_(model.head.weight)
    plain = [model(packed) for packed in alone(copies())]
    for packed in micro_batches(copies(), 12):
        numbers = packed.owner.unique_consecutive().tolist()
        for found, *expected in zip(model(packed), *(plain[n] for n in numbers), strict=True):
            torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-6)


def test_answers_of_unlike_length_stand_in_blocks_of_their_own():
    # Two prompts of one token; computed tokens of their answers: 8, 1, 4, 2 and 3, 6, 2, 1.
    some = [Text([p], [7] * (n + 1)) for p, lengths in ((5, (8, 1, 4, 2)), (6, (3, 6, 2, 1))) for n in lengths]
    layout = pack(some, range(8)).layout
    # By rank the longest are 8, 4, 2, 1: 4 is half of 8 and stays with it, 2 is not, and takes 1 along.
    assert layout.families == [Family(2, 1, ((2, 8), (2, 2)))]
    assert layout.families[0].sizes == [2, 2 * 2 * 8, 2 * 2 * 2]
    assert len(layout.token) == 2 + 32 + 8
    assert len(layout.place) + len(layout.empty) == len(layout.token)


def test_prompts_of_like_length_stand_together_and_a_lacking_answer_is_empty():
    # A prompt of four tokens with four answers, one of three with three; two tokens of each answer are computed.
    layout = pack([Text([p] * n, [7, 7, last]) for p, n in ((5, 4), (6, 3)) for last in range(n)], range(7)).layout
    assert layout.families == [Family(2, 4, ((4, 2),))]
    assert layout.families[0].hidden.tolist() == [[False] * 4, [False, False, False, True]]
    assert layout.empty.tolist() == [7, 22, 23]
    # Two tokens are less than three quarters of three, two answers less than three quarters of three.
    for prompt, count in ((2, 3), (3, 2)):
        some = [Text([p] * n, [7, 7, last]) for p, n, answers in ((5, 3, 3), (6, prompt, count)) for last in range(answers)]
        families = pack(some, range(len(some))).layout.families
        assert families == [Family(1, 3, ((3, 2),)), Family(1, prompt, ((count, 2),))]
        assert [family.hidden for family in families] == [None, None]


def test_texts_alone_stand_with_those_of_like_length():
    packed = pack([Text([5], [7] * 9), Text([6], [9] * 3), Text([8], [9] * 8)], range(3))
    assert packed.layout.families == [Family(2, 9), Family(1, 3)]
    assert packed.size == 9 + 3 + 8
    assert packed.layout.empty.tolist() == [17]


def test_every_text_goes_to_one_rank_and_ranks_have_like_work():
    items = texts(40, seed=3)
    for world in (1, 2, 3):
        shares = [micro_batches(items, 30, rank, world) for rank in range(world)]
        owners = [owner for share in shares for packed in share for owner in packed.owner.unique().tolist()]
        assert sorted(owners) == list(range(40))
        sizes = [sum(packed.size for packed in share) for share in shares]
        assert max(sizes) <= 1.25 * min(sizes)
        assert len({len(share) for share in shares}) == 1
    # Fewer texts than ranks: some have none.
    assert [len(micro_batches(items[:1], 30, rank, 2)) for rank in range(2)] in ([1, 0], [0, 1])


def test_entropy_of_a_uniform_distribution():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    logp, entropy = TokenScorer(model)(alone([Text([3], [4, 5])])[0])
    torch.testing.assert_close(entropy, torch.full((2,), 3.4657359))  # log 32
    torch.testing.assert_close(logp.float(), torch.full((2,), -3.4657359))


def test_a_cut_between_prompts_is_better_than_one_that_computes_a_prompt_twice():
    # Four prompts of 100 tokens with four answers of 10 to 13; ranks would cut answers from two of them if prompts were free.
    items = [Text([number] * 100, [*[7] * (10 + number), last]) for number in range(4) for last in range(4)]
    shares = [micro_batches(items, 160, rank, 2) for rank in range(2)]
    assert [[packed.owner.unique().tolist() for packed in share] for share in shares] == [
        [[0, 1, 2, 3], [8, 9, 10, 11]],
        [[4, 5, 6, 7], [12, 13, 14, 15]],
    ]
    # Short prompts are cheaper to compute twice than unequal parts: 30 tokens and two prompts of one token, in two parts.
    (first,), (second,) = [micro_batches([Text([3], [*[7] * 10, n]) for n in range(3)], 1000, rank, 2) for rank in range(2)]
    assert (first.size, second.size) in ((11, 21), (21, 11))


@pytest.mark.parametrize("seed", range(20))
def test_the_largest_part_is_as_small_as_it_can_be(seed):
    """Against the best of all cuts, found by trying every one; some answers are the same."""
    rng = random.Random(seed)
    items = [Text([number] * rng.randrange(1, 30), [7] * rng.randrange(2, 12)) for number in range(3) for _ in range(3)]
    items = [Text(items[n // 3 * 3].prompt, item.completion) for n, item in enumerate(items)]
    (whole,) = micro_batches(items, 10_000)
    items = [items[number] for number in whole.owner.unique_consecutive()]

    def size(cut):
        return pack([items[n] for n in cut], cut).size

    for parts in (2, 3):
        found = [packed.size for rank in range(parts) for packed in micro_batches(items, 10_000, rank, parts)]
        assert len(found) == parts
        best = min(
            max(size(range(a, b)) for a, b in itertools.pairwise((0, *ends, 9)))
            for ends in itertools.combinations(range(1, 9), parts - 1)
        )
        assert max(found) == best
