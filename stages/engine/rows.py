"""Rows of packed tokens: what a model is trained on, without padding between documents.

A row holds segments. A token sees the earlier tokens of its own segment and, when its segment has a parent, the parent's. So a
prompt is computed once for all answers packed behind it, and documents packed side by side do not see each other. Positions
count from 0 in a segment without parent, and go on after the parent in one with a parent.

`pad_rows` builds the same thing one sequence a row: the plain reference that tests compare with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Text:
    """A prompt and one continuation whose tokens are predicted."""

    prompt: Sequence[int]
    completion: Sequence[int]


@dataclass
class Rows:
    """A micro-batch. B rows of T columns; N predicted tokens, in the order of `owner`."""

    tokens: Tensor
    """(B, T) token ids."""
    positions: Tensor
    """(B, T) position of each token in its own text."""
    segments: Tensor
    """(B, T) number of the segment; -1 where nothing is."""
    parents: Tensor
    """(B, T) number of the segment's parent; the segment itself when it has none."""
    predictor: Tensor
    """(N,) flat index (row * T + column) of the token whose output predicts."""
    targets: Tensor
    """(N,) the token predicted."""
    owner: Tensor
    """(N,) number of the sequence the predicted token belongs to."""
    chunks: int = 1
    """Passes through the head. Ranks must agree on it: under ZeRO-3 every pass gathers the head's weights on all of them."""

    @property
    def size(self) -> int:
        """Tokens computed, empty places included."""
        return self.tokens.numel()

    def to(self, device: torch.device) -> "Rows":
        """The same rows on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Rows(**moved, chunks=self.chunks)

    def visible(self) -> Tensor:
        """(B, 1, T, T) whether the row's token i sees token j. An empty place sees itself, so that no row of it is empty."""
        columns = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        causal = columns[:, None] >= columns[None, :]  # (T, T)
        mine = self.segments[:, :, None]  # (B, T, 1)
        theirs = self.segments[:, None, :]  # (B, 1, T)
        related = (theirs == mine) | (theirs == self.parents[:, :, None])
        return ((causal & related & (theirs >= 0)) | torch.eye(len(columns), dtype=torch.bool, device=columns.device))[:, None]


class _Row:
    """A row under construction, as plain lists."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.segments: list[int] = []
        self.parents: list[int] = []
        self.predictor: list[int] = []
        self.targets: list[int] = []
        self.owner: list[int] = []
        self.count = 0

    def _segment(self, tokens: Sequence[int], start: int, parent: int | None) -> int:
        number = self.count
        self.count += 1
        self.tokens.extend(tokens)
        self.positions.extend(range(start, start + len(tokens)))
        self.segments.extend([number] * len(tokens))
        self.parents.extend([number if parent is None else parent] * len(tokens))
        return number

    def add_prompt(self, prompt: Sequence[int]) -> tuple[int, int]:
        """Add a prompt; returns its segment and the column of its last token."""
        segment = self._segment(prompt, 0, None)
        return segment, len(self.tokens) - 1

    def add_completion(self, completion: Sequence[int], prompt_length: int, segment: int, last: int, owner: int) -> None:
        """Add an answer behind its prompt. Its last token predicts nothing and is never computed."""
        first = len(self.tokens)
        self._segment(completion[:-1], prompt_length, segment)
        self.predictor.extend([last, *range(first, first + len(completion) - 1)])
        self.targets.extend(completion)
        self.owner.extend([owner] * len(completion))


def pack_rows(sequences: Sequence[Text], capacity: int) -> list[_Row]:
    """Pack sequences into rows of at most `capacity` tokens (longer only where one sequence is longer).

    Neighbours with the same prompt share it. The order of the sequences is kept; `owner` counts them.
    """
    rows: list[_Row] = []
    row, prompt, anchor = _Row(), None, (0, 0)
    for owner, item in enumerate(sequences):
        assert len(item.prompt) > 0 and len(item.completion) > 0, "a prompt and a completion have at least one token each"
        shares = prompt is not None and list(item.prompt) == prompt
        cost = len(item.completion) - 1 + (0 if shares else len(item.prompt))
        if row.tokens and len(row.tokens) + cost > capacity:
            rows.append(row)
            row, shares = _Row(), False
        if not shares:
            prompt = list(item.prompt)
            anchor = row.add_prompt(item.prompt)
        row.add_completion(item.completion, len(item.prompt), *anchor, owner)
    if row.tokens:
        rows.append(row)
    return rows


def pad_rows(sequences: Sequence[Text]) -> list[_Row]:
    """One sequence a row, nothing shared: the plain reference."""
    rows = []
    for owner, item in enumerate(sequences):
        row = _Row()
        row.add_completion(item.completion, len(item.prompt), *row.add_prompt(item.prompt), owner)
        rows.append(row)
    return rows


def batch_rows(rows: Sequence[_Row]) -> Rows:
    """Stack rows into one micro-batch; shorter rows are filled with token 0 that nobody sees."""
    width = max(len(row.tokens) for row in rows)

    def filled(name: str, empty: int) -> Tensor:
        return torch.tensor([[*getattr(row, name), *[empty] * (width - len(row.tokens))] for row in rows])

    predictor = [index * width + column for index, row in enumerate(rows) for column in row.predictor]
    return Rows(
        tokens=filled("tokens", 0),
        positions=filled("positions", 0),
        segments=filled("segments", -1),
        parents=filled("parents", -2),
        predictor=torch.tensor(predictor, dtype=torch.long),
        targets=torch.tensor([token for row in rows for token in row.targets], dtype=torch.long),
        owner=torch.tensor([owner for row in rows for owner in row.owner], dtype=torch.long),
    )


def micro_batches(rows: Sequence[_Row], tokens: int) -> list[Rows]:
    """Cut rows, sorted by length, into micro-batches of at most `tokens` places each (one row at least).

    Rows are sorted, so that little is filled; the sum of gradients does not depend on it.
    """
    batches: list[Rows] = []
    pending: list[_Row] = []
    for row in sorted(rows, key=lambda r: len(r.tokens), reverse=True):
        if pending and (len(pending) + 1) * len(pending[0].tokens) > tokens:
            batches.append(batch_rows(pending))
            pending = []
        pending.append(row)
    if pending:
        batches.append(batch_rows(pending))
    return batches
