"""Packed texts: what a model is trained on, without padding, and without computing a prompt twice that several answers share.

A micro-batch is one line of tokens. Neighbours with the same prompt share it: the prompt stands once, its answers follow. Every
token has its position in its own text; which tokens see which is the `Layout`'s business (attention.py). An answer's last token
predicts nothing and is never computed. `alone` packs the same texts one at a time: the plain reference that tests compare with.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.engine.attention import Family, Layout

FILLED = 0.75
"""Texts that share nothing are worked on together where the shortest has at least this share of the longest's tokens."""

ANSWERS_FILLED = 0.5
"""The same of answers to one prompt: more blocks of less filling are more calls."""


@dataclass
class Text:
    """A prompt and one continuation whose tokens are predicted."""

    prompt: Sequence[int]
    completion: Sequence[int]


@dataclass
class Packed:
    """A micro-batch: T tokens, of which N predicted ones are looked at, in the order of `owner`."""

    tokens: Tensor
    """(T,) token ids."""
    positions: Tensor
    """(T,) position of each token in its own text."""
    layout: Layout
    """Which tokens see which."""
    predictor: Tensor
    """(N,) index of the token whose output predicts."""
    targets: Tensor
    """(N,) the token predicted."""
    owner: Tensor
    """(N,) number of the text the predicted token belongs to."""
    longest: int
    """Tokens of the longest text that are computed."""
    chunks: int = 1
    """Passes through the head. Ranks must agree on it: under ZeRO-3 every pass gathers the head's weights on all of them."""

    @property
    def size(self) -> int:
        """Tokens computed."""
        return len(self.tokens)

    def to(self, device: torch.device) -> "Packed":
        """The same on another device."""
        return Packed(
            self.tokens.to(device),
            self.positions.to(device),
            self.layout.to(device),
            self.predictor.to(device),
            self.targets.to(device),
            self.owner.to(device),
            self.longest,
            self.chunks,
        )


@dataclass
class _Group:
    """A prompt and the answers behind it, as indices of tokens."""

    prompt: range
    answers: list[range] = field(default_factory=list)
    """Those with tokens to compute."""


def pack(texts: Sequence[Text], owners: Sequence[int]) -> Packed:
    """One micro-batch of texts, the n-th of which is number `owners[n]`. Neighbours with the same prompt share it."""
    tokens: list[int] = []
    positions: list[int] = []
    predictor: list[int] = []
    groups: list[_Group] = []
    prompt: Sequence[int] | None = None
    for text in texts:
        assert len(text.prompt) > 0 and len(text.completion) > 0, "a prompt and a completion have at least one token each"
        if prompt is None or not _same(prompt, text.prompt):
            prompt = text.prompt
            groups.append(_Group(range(len(tokens), len(tokens) + len(prompt))))
            tokens.extend(prompt)
            positions.extend(range(len(prompt)))
        first, computed = len(tokens), len(text.completion) - 1
        if computed:
            groups[-1].answers.append(range(first, first + computed))
        predictor.extend([groups[-1].prompt[-1], *range(first, first + computed)])
        tokens.extend(text.completion[:-1])
        positions.extend(range(len(prompt), len(prompt) + computed))
    return Packed(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        layout=_layout(groups, len(tokens)),
        predictor=torch.tensor(predictor),
        targets=torch.tensor([token for text in texts for token in text.completion]),
        owner=torch.tensor([n for n, text in zip(owners, texts, strict=True) for _ in text.completion]),
        longest=max(positions) + 1,
    )


def _same(one: Sequence[int], other: Sequence[int]) -> bool:
    return one is other or (len(one) == len(other) and list(one) == list(other))


def _layout(groups: Sequence[_Group], tokens: int) -> Layout:
    """Groups of as many answers to prompts of one length are a family, and so are texts alone of like length."""
    shared: dict[tuple[int, int], list[_Group]] = {}
    alone: list[list[int]] = []
    for group in groups:
        if len(group.answers) > 1:
            shared.setdefault((len(group.prompt), len(group.answers)), []).append(group)
        else:
            alone.append([*group.prompt, *(token for answer in group.answers for token in answer)])
    families: list[Family] = []
    places: list[int] = []  # -1: empty
    for some in _of_like_length(alone):
        families.append(Family(len(some), len(some[0])))
        for text in some:
            places += [*text, *[-1] * (len(some[0]) - len(text))]
    for (length, _), some_groups in shared.items():
        answers = [sorted(group.answers, key=len, reverse=True) for group in some_groups]
        places += [token for group in some_groups for token in group.prompt]
        blocks = []
        for start, end, longest in _blocks(answers):
            blocks.append((end - start, longest))
            for answer in (answer for group in answers for answer in group[start:end]):
                places += [*answer, *[-1] * (longest - len(answer))]
        families.append(Family(len(some_groups), length, tuple(blocks)))
    token = torch.tensor(places)
    filled = (token >= 0).nonzero().flatten()
    place = torch.empty(tokens, dtype=torch.long)
    place[token[filled]] = filled
    return Layout(families, token.clamp(min=0), place, (token < 0).nonzero().flatten())


def _blocks(answers: Sequence[Sequence[range]]) -> Iterator[tuple[int, int, int]]:
    """Where to cut equally many answers to each prompt, each prompt's longest first: start, end, tokens of the longest."""
    longest = [max(map(len, some)) for some in zip(*answers, strict=True)]
    start = 0
    for end in range(1, len(longest) + 1):
        if end == len(longest) or longest[end] < ANSWERS_FILLED * longest[start]:
            yield start, end, longest[start]
            start = end


def _of_like_length(texts: list[list[int]]) -> Iterator[list[list[int]]]:
    """The texts, longest first, cut where they get much shorter."""
    some: list[list[int]] = []
    for text in sorted(texts, key=len, reverse=True):
        if some and len(text) < FILLED * len(some[0]):
            yield some
            some = []
        some.append(text)
    if some:
        yield some


def micro_batches(texts: Sequence[Text], tokens: int, rank: int = 0, world_size: int = 1) -> list[Packed]:
    """Cut out this rank's micro-batches, of about `tokens` tokens at most; `owner` counts `texts`.

    All texts in their order are cut into equally large parts, equally many for every rank. A prompt whose answers are cut
    apart is computed in both parts. With fewer texts than ranks some ranks get none.
    """
    costs = []
    for index, text in enumerate(texts):
        shares = index > 0 and _same(texts[index - 1].prompt, text.prompt)
        costs.append(len(text.completion) - 1 + (0 if shares else len(text.prompt)))
    total = sum(costs)
    parts = -(-max(1, -(-total // tokens)) // world_size) * world_size
    cuts: list[list[int]] = [[] for _ in range(parts)]
    before = 0
    for index, cost in enumerate(costs):
        # Where the text's middle lies decides, so that parts differ by less than a text.
        cuts[min(parts - 1, int((before + cost / 2) * parts / max(1, total)))].append(index)
        before += cost
    mine = [cut for cut in cuts[rank::world_size] if cut]
    return [pack([texts[i] for i in cut], cut) for cut in mine]


def alone(texts: Sequence[Text]) -> list[Packed]:
    """One text a micro-batch, nothing shared: the plain reference."""
    return [pack([text], [owner]) for owner, text in enumerate(texts)]
