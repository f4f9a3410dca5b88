"""Lines: what is decoded. Answers to a prompt that are the same so far, token for token, are one line until they part.

All answers of a group begin as one, and those of a policy that has grown sure of itself part late or never. A line is computed
once for all of them; each draws its own next token from the line's logits with its own random numbers, so nothing else changes.
"""

import torch
from torch import Tensor

from stages.rollout.decoding.decoder import Cache, LeanDecoder, Prompts


class Lines:
    """Up to a number of lines side by side, of which the first `count` are there."""

    def __init__(self, decoder: LeanDecoder, most: int, room: int) -> None:
        """Place for `most` lines of `room` own tokens."""
        self._decoder, self.count = decoder, 0
        self.own = decoder.cache(most, room)
        self.newest, self.lengths, self.prompt = (
            torch.zeros(most, dtype=torch.long, device=decoder.weight.device) for _ in range(3)
        )
        """(most,) the newest token, how many tokens `own` has, and the number of the prompt."""
        self._prompts: Prompts | None = None

    @property
    def longest(self) -> int:
        """Own tokens of the longest."""
        return int(self.lengths[: self.count].max()) if self.count else 0

    def step(self, cache: Cache, prompt_lengths: Tensor) -> Tensor:
        """(count, V) logits after the newest token of each. cache: keys and values of the prompts; prompt_lengths: (S,)."""
        if self._prompts is None:
            self._prompts = Prompts(cache, prompt_lengths, self.prompt[: self.count].clone())
        own = self.newest[: self.count], self.lengths[: self.count]
        logits = self._decoder.step(own[0], self._prompts, self.own, own[1], self.longest + 1)
        self.lengths[: self.count] += 1
        return logits

    def seat(self, lines: Tensor, prompts: Tensor) -> None:
        """Say anew which prompt each of these lines has; every line must be among them."""
        self.prompt[lines] = prompts
        self._prompts = None

    def begin(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        """New lines for answers, (n,), to these prompts with these first tokens; returns the line of each."""
        first, newest, which = _pairs(prompts, tokens)
        places = torch.arange(self.count, self.count + len(first), device=first.device)
        self.prompt[places], self.newest[places], self.lengths[places] = first, newest, 0
        self.count += len(places)
        self._prompts = None
        return places[which]

    def follow(self, lines: Tensor, tokens: Tensor) -> Tensor:
        """Let answers, (n,), on these lines go on with these tokens; returns the line of each.

        Where they part, one keeps the line and the others get copies of it; lines on which no answer is any more are gone.
        """
        if len(lines) == self.count and len(lines.unique()) == self.count:  # each answer on a line of its own
            self.newest[lines] = tokens
            return lines
        parents, newest, which = _pairs(lines, tokens)
        count = len(parents)
        stays = parents < count
        stays[1:] &= parents[1:] != parents[:-1]
        free = torch.ones(count, dtype=torch.bool, device=parents.device)
        free[parents[stays]] = False
        # A place that is free is nobody's parent, so nothing that is still to be copied is written over.
        places = parents.clone()
        places[~stays] = free.nonzero().flatten()
        to, source = places[~stays], parents[~stays]
        if len(to):
            width = int(self.lengths[source].max())
            self.own.both[:, :, to, :, :width] = self.own.both[:, :, source, :, :width]
            self.lengths[to], self.prompt[to] = self.lengths[source], self.prompt[source]
        self.newest[places] = newest
        self.count, self._prompts = count, None
        return places[which]

    def moved(self, most: int, room: int) -> "Lines":
        """The same with place for other numbers of lines and tokens."""
        found = Lines(self._decoder, most, room)
        found.count, width = self.count, self.longest
        found.own.both[:, :, : self.count, :, :width] = self.own.both[:, :, : self.count, :, :width]
        for name in ("newest", "lengths", "prompt"):
            getattr(found, name)[: self.count] = getattr(self, name)[: self.count]
        return found


def _pairs(numbers: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct pairs, ascending by number, as two tensors, and (n,) which of them each given one is."""
    beyond = int(tokens.max()) + 1 if len(tokens) else 1
    pairs, which = torch.unique(numbers * beyond + tokens, return_inverse=True)
    return pairs // beyond, pairs % beyond, which
