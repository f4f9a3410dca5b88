"""Supervised training: which documents a step takes and which are held out, loss and gradient, no leaks between documents."""

import random
from array import array
from types import MappingProxyType, SimpleNamespace

import pytest
import torch

from stages.contract.errors import UserError
from stages.engine import distributed
from stages.engine.deepspeed_engine import Engine
from stages.engine.packing.attention import NAME
from stages.engine.packing.pack import Text, micro_batches, pack
from stages.engine.scorer import TokenScorer
from stages.engine.settings import Training
from stages.supervised.documents import Document, hold_out, load_documents, tokenize
from stages.supervised.held_out import HeldOut
from stages.supervised.order import Order
from stages.supervised.settings import Validation
from stages.supervised.train import accumulate
from tests.conftest import tiny_llama


def documents(count=11, seed=0):
    """Texts of unlike lengths; some share their prompt with a neighbour, one has an answer of a single token."""
    rng = random.Random(seed)
    found, prompt = [], []
    for number in range(count):
        if number % 3 != 2:
            prompt = [rng.randrange(32) for _ in range(rng.randrange(1, 12))]
        length = 1 if number == 4 else rng.randrange(1, 20)
        found.append(Text(array("i", prompt), array("i", [rng.randrange(32) for _ in range(length)])))
    return found


def plain_losses(model, texts):
    """Sum of the negative log-likelihoods of each text's completion, by transformers' own forward over that text alone."""
    found = []
    for text in texts:
        ids = torch.tensor([[*text.prompt, *text.completion]])
        labels = ids.clone()
        labels[0, : len(text.prompt)] = -100
        assert model.config._attn_implementation != NAME
        found.append(model(input_ids=ids, labels=labels).loss * len(text.completion))
    return found


def gradient(model):
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


@pytest.mark.parametrize(("micro", "cuts"), [(1, 11), (30, 5), (75, 2), (10_000, 1)])
def test_loss_and_gradient_are_those_of_one_document_at_a_time(micro, cuts):
    texts, plain = documents(), tiny_llama().float()
    plain.get_input_embeddings().padding_idx = None  # the pad id is a token of the texts
    total = sum(len(text.completion) for text in texts)
    loss = sum(plain_losses(plain, texts)) / total
    loss.backward()
    loss = loss.item()

    model = tiny_llama().float()
    engine = Engine(TokenScorer(model), Training(), "zero0", "cpu")
    found, tokens = accumulate(engine, texts, micro)
    assert found == pytest.approx(loss, rel=1e-5)
    assert torch.linalg.norm(gradient(model) - gradient(plain)) / torch.linalg.norm(gradient(plain)) <= 1e-5
    assert len(micro_batches(texts, micro)) == cuts
    assert total < tokens < sum(len(text.prompt) + len(text.completion) for text in texts)


def test_a_held_out_loss_is_the_mean_over_its_tokens_and_leaves_no_gradient():
    texts, plain = documents(), tiny_llama().float()
    names = ["b" if number % 4 else "a" for number in range(len(texts))]
    losses = [x.item() for x in plain_losses(plain, texts)]
    engine = Engine(TokenScorer(tiny_llama().float()), Training(), "zero0", "cpu")
    for micro in (20, 10_000):
        found = HeldOut(texts, names, micro).measure(engine)
        for key, chosen in (("eval/loss", "ab"), ("eval/loss/a", "a"), ("eval/loss/b", "b")):
            mine = [n for n, name in enumerate(names) if name in chosen]
            expected = sum(losses[n] for n in mine) / sum(len(texts[n].completion) for n in mine)
            assert found[key] == pytest.approx(expected, rel=1e-5)
    assert HeldOut(texts, ["a"] * len(texts), 20).measure(engine).keys() == {"eval/loss"}
    assert all(p.grad is None for p in engine.model.parameters())


def shifted(tokens, by):
    return array("i", [(token + by) % 32 for token in tokens])


@pytest.mark.parametrize("changed", range(11))
def test_a_document_does_not_see_its_neighbours(changed):
    """Every token of a document is changed, then its length: the losses of all others stay as they were, its own does not.

    One that shares its prompt with a neighbour keeps it: its answer's tokens are changed.
    """
    texts, scorer = documents(), TokenScorer(tiny_llama().float())

    def losses(some):
        packed = pack(some, range(len(some)))
        with torch.no_grad():
            logp, _ = scorer(packed)
        return torch.zeros(len(some)).index_add(0, packed.owner, logp)

    before, text = losses(texts), texts[changed]
    shares = any(0 <= n < len(texts) and list(texts[n].prompt) == list(text.prompt) for n in (changed - 1, changed + 1))
    prompt = text.prompt if shares else shifted(text.prompt, 1)
    rest = [n for n in range(len(texts)) if n != changed]
    for completion, exact in ((shifted(text.completion, 5), True), (array("i", [7] * 24), False)):
        after = losses([*texts[:changed], Text(prompt, completion), *texts[changed + 1 :]])
        if exact:
            assert torch.equal(after[rest], before[rest])
        else:  # it stands with others side by side: kernels may cut their work otherwise
            torch.testing.assert_close(after[rest], before[rest], rtol=1e-6, atol=0)
        assert abs(after[changed] - before[changed]) > 1e-3


def test_the_gradient_of_a_document_does_not_reach_its_neighbours_tokens():
    texts, scorer = documents(), TokenScorer(tiny_llama())
    packed, captured = pack(texts, range(len(texts))), []
    scorer.model.get_input_embeddings().register_forward_hook(
        lambda module, given, out: captured.append(out.detach().requires_grad_()) or captured[0]
    )
    logp, _ = scorer(packed)
    logp[packed.owner == 6].sum().backward()
    moved = captured[0].grad[0].abs().sum(-1) > 0
    before = sum(len(t.prompt) for i, t in enumerate(texts[:6]) if i % 3 != 2) + sum(len(t.completion) - 1 for t in texts[:6])
    own = len(texts[6].prompt) + len(texts[6].completion) - 1
    assert moved.nonzero().flatten().tolist() == list(range(before, before + own))


def old_order(count, places, batch, seed, step):
    """As the quickstart's base and cold start have always been read."""
    chosen = []
    for place in range(step * batch, min((step + 1) * batch, places)):
        epoch, index = divmod(place, count)
        order = list(range(count))
        random.Random(f"documents-{seed}-{epoch}").shuffle(order)
        chosen.append(order[index])
    return chosen


def test_without_weights_all_documents_are_one_pool():
    order = Order([7, 3], None, places=25, batch=4, seed=5)
    assert order.steps == 7
    for step in range(7):
        assert order.of_step(step) == old_order(10, 25, 4, 5, step)
    assert len(order.of_step(6)) == 1
    first = [number for step in range(7) for number in order.of_step(step)][:10]
    assert sorted(first) == list(range(10)) != first


def test_weights_give_each_stretch_its_proportions_and_each_dataset_its_epochs():
    order = Order([30, 4], [3, 1], places=80, batch=8, seed=1)
    taken = [order.of_step(step) for step in range(order.steps)]
    assert all(sum(number >= 30 for number in step) == 2 for step in taken)
    small = [number for step in taken for number in step if number >= 30]
    large = [number for step in taken for number in step if number < 30]
    assert [sorted(small[i : i + 4]) for i in range(0, 20, 4)] == [[30, 31, 32, 33]] * 5
    assert len({tuple(small[i : i + 4]) for i in range(0, 20, 4)}) > 1  # shuffled anew
    assert sorted(large[:30]) == sorted(large[30:]) == list(range(30))
    # A step is what it is, whatever was asked for before.
    again = Order([30, 4], [0.75, 0.25], places=80, batch=8, seed=1)
    assert again.of_step(7) == taken[7]
    assert Order([30, 4], [3, 1], places=80, batch=8, seed=2).of_step(0) != taken[0]


def test_documents_of_a_problem_are_held_out_together():
    def document(prompt, problem=""):
        return Document(prompt, "x", problem)

    # 40 problems; the first has three documents: two of one id, the third with the prompt of the second and another id.
    some = [document("a", "one"), document("b", "one"), document("b", "two"), *[document(f"p{n}") for n in range(39)]]
    for seed in range(40):
        trained, held = hold_out(some, Validation(count=10), seed)
        assert sorted(trained + held) == list(range(42))
        assert len({0, 1, 2} & set(held)) in (0, 3)
        assert 10 <= len(held) <= 12
        assert len(hold_out(some[3:], Validation(count=10), seed)[1]) == 10
    assert any(0 in hold_out(some, Validation(count=10), seed)[1] for seed in range(40))
    # The same problems whatever the order of the rows; others with another seed.
    kept = {some[n].prompt for n in hold_out(some, Validation(share=0.25), 3)[1]}
    turned = some[::-1]
    assert {turned[n].prompt for n in hold_out(turned, Validation(share=0.25), 3)[1]} == kept
    assert {some[n].prompt for n in hold_out(some, Validation(share=0.25), 4)[1]} != kept
    assert hold_out(some, Validation(), 0) == (list(range(42)), [])
    with pytest.raises(UserError, match="all 2 documents are held out, of 1 problems"):
        hold_out(some[:2], Validation(count=1), 0)


def test_share_and_count_exclude_each_other():
    with pytest.raises(ValueError, match="not both"):
        Validation(share=0.1, count=3)
    assert (Validation(share=0.1).wanted(31), Validation(count=5).wanted(31), Validation().wanted(31)) == (4, 5, 0)


def test_the_rate_rises_in_a_line_and_falls_to_a_tenth_in_a_cosine():
    rate = Training(lr=8.0, schedule="cosine", warmup_steps=4)
    assert [rate.lr_at(step, 104) for step in range(5)] == [2, 4, 6, 8, 8]
    assert rate.lr_at(54, 104) == pytest.approx(0.8 + 7.2 / 2)  # half way
    assert rate.lr_at(29, 104) == pytest.approx(0.8 + 7.2 * (1 + 0.5**0.5) / 2)  # a quarter
    assert rate.lr_at(104, 104) == pytest.approx(0.8)
    assert Training(lr=8.0, schedule="cosine", final_share=0.5).lr_at(10, 10) == pytest.approx(4)


class Letters:
    """A tokenizer of single letters that begins a text with 99, and has 0 as its end."""

    eos_token_id = 0
    bos_token_id = 99
    pad_token_id = None
    is_fast = True
    all_special_ids = (0, 99)
    added_tokens_decoder = MappingProxyType({})

    def __call__(self, texts, add_special_tokens=True):
        return SimpleNamespace(input_ids=[[99] * add_special_tokens + [ord(c) - 96 for c in text] for text in texts])

    def convert_ids_to_tokens(self, ids):
        return [chr(96 + n) for n in ids]

    def decode(self, ids, **_):
        return "".join({0: "<end>", 99: "<begin>"}.get(n, chr(96 + n)) for n in ids)


def test_prompt_and_completion_are_tokenized_apart_and_the_answer_ends(monkeypatch):
    monkeypatch.setattr("stages.supervised.documents.AT_ONCE", 2)
    some = [Document("ab", "c"), Document("a", ""), Document("b", "abc")]
    found = [(list(prompt), list(completion)) for prompt, completion in tokenize(some, Letters())]
    assert found == [([99, 1, 2], [3, 0]), ([99, 1], [0]), ([99, 2], [1, 2, 3, 0])]


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = Letters()
    tokenizer.eos_token_id = None
    with pytest.raises(UserError, match="no end token"):
        tokenize([Document("a", "b")], tokenizer)


def test_a_row_without_text_is_named(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "problem_id": 3}\n{"prompt": "a"}\n')
    with pytest.raises(UserError, match="row 2 has no text"):
        load_documents(path)
    path.write_text('{"prompt": "a", "completion": "b", "problem_id": 3}\n')
    assert load_documents(path, 1) == [Document("a", "b", "3", 1)]
    path.write_text("")
    with pytest.raises(UserError, match="no rows"):
        load_documents(path)


def test_one_process_is_a_group_of_one():
    distributed.join("cpu")
    assert (distributed.number(), distributed.size()) == (0, 1)
