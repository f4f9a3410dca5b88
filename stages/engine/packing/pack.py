"""Packed texts: what a model is trained on, without padding, and without computing twice what several answers share.

A micro-batch is one line of tokens. What all its prompts begin with stands once, at its head. Neighbours with the same prompt
share the rest of it: it stands once, its answers follow. Of neighbours that are the same token for token the first alone is
computed (a policy that has grown sure of itself gives many of its group's answers twice); what is found of it counts for each,
so losses and gradients are those of all of them. Every token has its position in its own text; which tokens see which is the
`Layout`'s business (attention.py). An answer's last token predicts nothing and is never computed. `alone` packs the same texts
one at a time: the plain reference that tests compare with.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from stages.engine.packing.attention import Family, Layout
from stages.engine.packing.partition import even_parts

FILLED = 0.75
"""Texts are worked on together where the shortest has at least this share of the longest's tokens.

So are prompts, where one also has this share of another's answers.
"""

LEAST_PREFIX = 16
"""Tokens that all prompts must have in common before these are worked on apart from the rest."""

ANSWERS_FILLED = 0.5
"""The same of answers to one prompt: more blocks of less filling are more calls."""


TrainingPath = Literal["packed", "rows"]
"""How texts reach a model: many in one line of tokens, or one at a time through its own forward pass."""


@dataclass
class Text:
    """A prompt and one continuation whose tokens are predicted."""

    prompt: Sequence[int]
    completion: Sequence[int]


@dataclass
class Packed:
    """A micro-batch: T tokens and N predicted ones, in the order of `owner`, of which D are distinct."""

    tokens: Tensor
    """(T,) token ids."""
    positions: Tensor
    """(T,) position of each token in its own text."""
    layout: Layout | None
    """Which tokens see which; None for a row: one text alone, which the model's own forward pass reads as it is."""
    predictor: Tensor
    """(D,) index of the token whose output predicts."""
    targets: Tensor
    """(D,) the token predicted."""
    spread: Tensor | None
    """(N,) which of the distinct ones each predicted token is; None when all are distinct."""
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

    def each(self, found: Tensor) -> Tensor:
        """(D, …) what was found of the distinct predicted tokens as (N, …), one of each."""
        return found if self.spread is None else found.index_select(0, self.spread)

    def to(self, device: torch.device) -> "Packed":
        """The same on another device."""
        return Packed(
            self.tokens.to(device),
            self.positions.to(device),
            None if self.layout is None else self.layout.to(device),
            self.predictor.to(device),
            self.targets.to(device),
            None if self.spread is None else self.spread.to(device),
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


def pack(texts: Sequence[Text], owners: Sequence[int], prefix: int = 0) -> Packed:
    """One micro-batch of texts, the n-th of which is number `owners[n]`. Neighbours share what the head of this file says.

    prefix: tokens that all prompts begin with, fewer than any of them has.
    """
    tokens: list[int] = list(texts[0].prompt[:prefix])
    positions: list[int] = list(range(prefix))
    predictor: list[int] = []
    targets: list[int] = []
    spread: list[int] = []
    groups: list[_Group] = []
    before: Text | None = None
    for text in texts:
        assert len(text.prompt) > 0 and len(text.completion) > 0, "a prompt and a completion have at least one token each"
        shared = before is not None and _same(before.prompt, text.prompt)
        again = shared and before is not None and _same(before.completion, text.completion)
        before, prompt = text, text.prompt
        if again:
            spread.extend(range(len(targets) - len(text.completion), len(targets)))
            continue
        if not shared:
            groups.append(_Group(range(len(tokens), len(tokens) + len(prompt) - prefix)))
            tokens.extend(prompt[prefix:])
            positions.extend(range(prefix, len(prompt)))
        first, computed = len(tokens), len(text.completion) - 1
        if computed:
            groups[-1].answers.append(range(first, first + computed))
        predictor.extend([groups[-1].prompt[-1], *range(first, first + computed)])
        spread.extend(range(len(targets), len(targets) + len(text.completion)))
        targets.extend(text.completion)
        tokens.extend(text.completion[:-1])
        positions.extend(range(len(prompt), len(prompt) + computed))
    return Packed(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        layout=_layout(groups, len(tokens), prefix),
        predictor=torch.tensor(predictor),
        targets=torch.tensor(targets),
        spread=torch.tensor(spread) if len(spread) > len(targets) else None,
        owner=torch.tensor([n for n, text in zip(owners, texts, strict=True) for _ in text.completion]),
        longest=max(positions) + 1,
    )


def _same(one: Sequence[int], other: Sequence[int]) -> bool:
    return one is other or (len(one) == len(other) and list(one) == list(other))


def _layout(groups: Sequence[_Group], tokens: int, prefix: int) -> Layout:
    """Prompts of like length with about as many answers are a family, and so are texts alone of like length."""
    alone = [[*g.prompt, *(t for answer in g.answers for t in answer)] for g in groups if len(g.answers) < 2]
    families: list[Family] = []
    places = list(range(prefix))  # -1: empty

    def put(line: Sequence[int], room: int) -> None:
        places.extend(line)
        places.extend([-1] * (room - len(line)))

    for texts in _of_like_length(alone, prefix):
        families.append(Family(len(texts), len(texts[0])))
        for text in texts:
            put(text, len(texts[0]))
    for some in _alike([group for group in groups if len(group.answers) > 1], prefix):
        lengths, most = [len(group.prompt) for group in some], max(len(group.answers) for group in some)
        for group in some:
            put(group.prompt, max(lengths))
        answers = [_filled_up(sorted(group.answers, key=len, reverse=True), most) for group in some]
        blocks = []
        for start, end, longest in _blocks(answers):
            blocks.append((end - start, longest))
            for answer in (answer for group in answers for answer in group[start:end]):
                put(answer, longest)
        even = min(lengths) == max(lengths)
        hidden = None if even else torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
        families.append(Family(len(some), max(lengths), tuple(blocks), hidden))
    token = torch.tensor(places)
    filled = (token >= 0).nonzero().flatten()
    place = torch.empty(tokens, dtype=torch.long)
    place[token[filled]] = filled
    return Layout(families, token.clamp(min=0), place, (token < 0).nonzero().flatten(), prefix)


def _alike(groups: Iterable[_Group], prefix: int) -> list[list[_Group]]:
    """Groups that fill one family well enough, as what comes behind the prefix."""
    found: list[list[_Group]] = []
    for group in groups:
        for some in found:
            prompts, answers = (
                [size(g) for g in (*some, group)] for size in (lambda g: len(g.prompt), lambda g: len(g.answers))
            )
            if _like(min(prompts), max(prompts), prefix) and _like(min(answers), max(answers)):
                some.append(group)
                break
        else:
            found.append([group])
    return found


def _like(least: int, most: int, prefix: int = 0) -> bool:
    """Whether sizes fill one family well enough: with the prefix before them, and at least half of it without."""
    return prefix + least >= FILLED * (prefix + most) and 2 * least >= most


def _filled_up(answers: list[range], count: int) -> list[range]:
    return answers + [range(0)] * (count - len(answers))


def _blocks(answers: Sequence[Sequence[range]]) -> Iterator[tuple[int, int, int]]:
    """Where to cut equally many answers to each prompt, each prompt's longest first: start, end, tokens of the longest."""
    longest = [max(map(len, some)) for some in zip(*answers, strict=True)]
    start = 0
    for end in range(1, len(longest) + 1):
        if end == len(longest) or longest[end] < ANSWERS_FILLED * longest[start]:
            yield start, end, longest[start]
            start = end


def _of_like_length(texts: list[list[int]], prefix: int) -> Iterator[list[list[int]]]:
    """The texts behind the prefix, longest first, cut where they get much shorter."""
    some: list[list[int]] = []
    for text in sorted(texts, key=len, reverse=True):
        if some and not _like(len(text), len(some[0]), prefix):
            yield some
            some = []
        some.append(text)
    if some:
        yield some


def micro_batches(texts: Sequence[Text], tokens: int, rank: int = 0, world_size: int = 1) -> list[Packed]:
    """Cut out this rank's micro-batches, of about `tokens` tokens at most; `owner` counts `texts`.

    All texts in their order, but the same ones of a prompt side by side, are cut into parts of like size, equally many for
    every rank. What is shared by texts that are cut apart is computed in both parts, which is counted. With a prefix for each
    prompt a part has no more than twice `tokens`: attention holds its keys and values for each. With fewer texts than ranks
    some ranks get none.
    """
    order = _same_together(texts)
    line = [texts[number] for number in order]
    prefix = _shared_prefix(line, tokens)
    own, prompts = [len(text.completion) - 1 for text in line], [len(text.prompt) - prefix for text in line]
    shares = [index > 0 and _same(line[index - 1].prompt, text.prompt) for index, text in enumerate(line)]
    for index, text in enumerate(line):
        if shares[index] and _same(line[index - 1].completion, text.completion):
            # The same as the one before it: takes nothing behind it, and all of it where a part begins with it.
            own[index], prompts[index] = 0, prompts[index] + own[index]
    total = sum(own) + sum(size for size, shared in zip(prompts, shares, strict=True) if not shared)
    seen = total + prefix * shares.count(False)
    wanted = max(1, -(-total // (tokens - prefix)), -(-seen // (2 * tokens)) if prefix else 1)
    count = -(-wanted // world_size) * world_size
    mine = even_parts(own, prompts, shares, count)[rank::world_size]
    return [pack([line[i] for i in part], [order[i] for i in part], prefix) for part in mine if part]


def _shared_prefix(texts: Sequence[Text], tokens: int) -> int:
    """Tokens that all prompts begin with; 0 where they are too few to share, or half of a micro-batch."""
    prompts = [text.prompt for index, text in enumerate(texts) if not index or not _same(texts[index - 1].prompt, text.prompt)]
    if len(prompts) < 2:
        return 0
    first, length = prompts[0], min(map(len, prompts)) - 1
    for prompt in prompts[1:]:
        length = next((at for at in range(length) if prompt[at] != first[at]), length)
    return length if LEAST_PREFIX <= length <= tokens // 2 else 0


def _same_together(texts: Sequence[Text]) -> list[int]:
    """Numbers of the texts in their order, but those that are the same as an earlier one with its prompt right behind it."""
    order: list[int] = []
    copies: dict[tuple[int, ...], list[int]] = {}
    for number, text in enumerate(texts):
        if number and not _same(texts[number - 1].prompt, text.prompt):
            order.extend(itertools.chain(*copies.values()))
            copies = {}
        copies.setdefault(tuple(text.completion), []).append(number)
    return [*order, *itertools.chain(*copies.values())]


def rows(texts: Sequence[Text], rank: int = 0, world_size: int = 1, owners: Sequence[int] | None = None) -> list[Packed]:
    """Cut out this rank's rows: micro-batches with one text each and no layout, for models that cannot read packed texts.

    Neighbours that are the same token for token are computed once. Ranks get equally many rows, give or take one, the longest
    dealt first, so that the n-th rows of all ranks are about equally long. `owners`: number of each text, by default from 0.
    """
    order = _same_together(texts)
    tokens = [(tuple(text.prompt), tuple(text.completion)) for text in texts]
    alike = [list(same) for _, same in itertools.groupby(order, key=lambda n: tokens[n])]
    alike.sort(key=lambda same: -sum(map(len, tokens[same[0]])))
    numbers = range(len(texts)) if owners is None else owners
    return [row([texts[n] for n in same], [numbers[n] for n in same]) for same in alike[rank::world_size]]


def row(texts: Sequence[Text], owners: Sequence[int]) -> Packed:
    """A micro-batch without layout: one text, or several that are the same token for token."""
    return replace(pack(texts, owners), layout=None)


def alone(texts: Sequence[Text]) -> list[Packed]:
    """One text a micro-batch, nothing shared: the plain reference."""
    return [pack([text], [owner]) for owner, text in enumerate(texts)]
