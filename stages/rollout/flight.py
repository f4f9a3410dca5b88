"""Answers in flight: which rows decode together, when finished ones make room for waiting ones, and what memory they take.

Keys and values are held for at most `budget` tokens (one answer runs whatever it takes). Room for the answers' own tokens
doubles when the longest needs it; where that would go over the budget, the youngest answers go back to wait and start again
(the same random numbers, so the same answer). A finished row is computed along until an eighth of the rows have finished; then
waiting answers take their places, or, when none wait, the last rows do.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.rollout.lean import Cache, LeanDecoder, Prompts
from stages.rollout.sampling import Choose
from stages.store import heartbeat

FIRST_ROOM = 64
"""Own tokens that an answer has room for at first."""
PER_ROW = ("newest", "lengths", "counts", "limits", "alive", "ids", "logps", "numbers")
"""What `_Rows` has of each row beside keys and values."""
AT_ONCE = 8192
"""Tokens of prompts that are prefilled at once."""

Ended = Callable[[Tensor, Tensor], Tensor]
"""(R, max_tokens) tokens and (R,) how many of them there are -> (R,) whether an end has come."""


@dataclass
class Answer:
    """One answer to be sampled."""

    prompt: tuple[int, ...]
    numbers: Tensor
    """(n,) random numbers: one for each token that it may have at most."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    """Whether it ended of itself; else at the limit."""


Over = Callable[[Answer], None]


@dataclass
class _Prompt:
    """A prompt in flight: its own keys and values, and what follows it."""

    cache: Cache
    logits: Tensor
    """(V,)."""


class _Rows:
    """The state of R rows."""

    def __init__(self, decoder: LeanDecoder, rows: int, room: int, limit: int) -> None:
        """Empty rows, with place for `room` own tokens of at most `limit`."""
        self._decoder, self._limit = decoder, limit
        device = decoder.weight.device
        self.own = decoder.cache(rows, room)
        self.newest, self.lengths, self.counts, self.limits = (
            torch.zeros(rows, dtype=torch.long, device=device) for _ in range(4)
        )
        """(R,) the newest token, how many tokens `own` has, how many were sampled, and how many may be."""
        self.alive = torch.zeros(rows, dtype=torch.bool, device=device)
        """(R,) whether an answer is there that has not ended."""
        self.ids = torch.zeros(rows, limit, dtype=torch.long, device=device)
        self.logps, self.numbers = (torch.zeros(rows, limit, device=device) for _ in range(2))
        """(R, limit) log-probabilities of the tokens `ids`, and the random numbers they are drawn with."""

    def close_ranks(self, living: list[int]) -> list[int]:
        """Let the last living rows take the places of the dead, and forget what is behind; which row then is where."""
        count, order = len(living), list(range(len(living)))
        alive = set(living)
        holes = [row for row in range(count) if row not in alive]
        movers = [row for row in living if row >= count]
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        if holes:
            to, source = (torch.tensor(rows, device=self.ids.device) for rows in (holes, movers))
            width = int(self.lengths.max())
            for part in self.own.both.flatten(0, 1):  # (rows, K, C, d)
                part[to, :, :width] = part[source, :, :width]
            for name in PER_ROW:
                getattr(self, name)[to] = getattr(self, name)[source]
        for name in PER_ROW:
            setattr(self, name, getattr(self, name)[:count])
        return order

    def moved(self, kept: list[int], fresh: int, room: int) -> "_Rows":
        """New memory with the kept rows, and `fresh` empty ones behind them."""
        found = _Rows(self._decoder, len(kept) + fresh, room, self._limit)
        if kept:
            index, width = torch.tensor(kept, device=self.ids.device), int(self.lengths.max())
            found.own.both[:, :, : len(kept), :, :width] = self.own.both[:, :, index, :, :width]
            for name in PER_ROW:
                getattr(found, name)[: len(kept)] = getattr(self, name)[index]
        return found


class Flight:
    """Decodes answers to their ends."""

    def __init__(
        self, decoder: LeanDecoder, answers: Iterable[Answer], choose: Choose, ended: Ended, over: Over, *, budget: int
    ) -> None:
        """`answers`: those to one prompt stand together; `over` is told of each at its end; `budget`: see the module."""
        self._decoder, self._choose, self._ended, self._over, self._budget = decoder, choose, ended, over, budget
        self._waiting = deque(answers)
        self._limit = limit = max((len(answer.numbers) for answer in self._waiting), default=0)
        self._room = min(limit, FIRST_ROOM)
        self._known: dict[tuple[int, ...], _Prompt] = {}
        self._prefix, self._prefix_length = self._shared_prefix()
        self._answers: list[Answer | None] = []
        """Whose row it is; None where the answer has ended."""
        self._rows = _Rows(decoder, 0, self._room, limit)
        self._device = decoder.weight.device

    def run(self) -> None:
        """Fill in every answer."""
        while self._waiting or any(self._answers):
            if sum(row is None for row in self._answers) * 8 >= len(self._answers):
                self._take_in()
            if any(self._answers):
                heartbeat.progress()
                self._step()

    # --- one token ---

    def _step(self) -> None:
        """One more token for every row; those that have ended are computed along and written nowhere."""
        if int(self._rows.lengths.max()) >= self._room:
            self._widen()
        width = int(self._rows.lengths.max()) + 1
        logits = self._decoder.step(self._rows.newest, self._prompts, self._rows.own, self._rows.lengths, width)
        self._rows.lengths += self._rows.alive
        living = self._rows.alive.nonzero().flatten()
        self._write(living, logits if len(living) == len(logits) else logits[living])

    def _write(self, rows: Tensor, logits: Tensor) -> None:
        """Draw the next token of these living rows, and part from those that have come to their end."""
        counts = self._rows.counts[rows]
        chosen, logp = self._choose(logits.float(), self._rows.numbers[rows, counts])
        self._rows.ids[rows, counts], self._rows.logps[rows, counts] = chosen, logp
        self._rows.counts[rows] += 1
        self._rows.newest[rows] = chosen
        stopped = self._ended(self._rows.ids[rows], self._rows.counts[rows])
        over = stopped | (self._rows.counts[rows] == self._rows.limits[rows])
        for row, by_itself in zip(rows[over].tolist(), stopped[over].tolist(), strict=True):
            answer, count = self._answers[row], int(self._rows.counts[row])
            assert answer is not None
            answer.ids, answer.logprobs = self._rows.ids[row, :count].tolist(), self._rows.logps[row, :count].tolist()
            answer.stopped = by_itself
            self._answers[row] = None
            self._rows.alive[row] = False
            self._over(answer)

    # --- who is in flight ---

    def _take_in(self) -> None:
        """Seat waiting answers where rows have ended; when none wait, move the rest together."""
        free = [number for number, row in enumerate(self._answers) if row is None]
        if not any(self._answers):
            self._resize([], self._fitting())
            free = list(range(len(self._answers)))
        elif not free:
            return
        elif not self._waiting:
            order = self._rows.close_ranks([number for number, row in enumerate(self._answers) if row is not None])
            self._answers = [self._answers[number] for number in order]
            self._seat_prompts()
            return
        fresh: list[int] = []
        for row in free:
            if not self._waiting or (fresh and not self._affordable(self._waiting[0].prompt)):
                break
            answer = self._waiting.popleft()
            self._answers[row] = answer
            self._rows.limits[row] = len(answer.numbers)
            self._rows.numbers[row, : len(answer.numbers)] = answer.numbers.to(self._device)
            self._rows.lengths[row], self._rows.counts[row], self._rows.alive[row] = 0, 0, True
            self._prefill_from(answer)
            fresh.append(row)
        if not fresh:
            return
        self._seat_prompts()
        logits = torch.stack([self._known[a.prompt].logits for n in fresh if (a := self._answers[n])])
        self._write(torch.tensor(fresh, device=self._device), logits)

    def _fitting(self) -> int:
        """How many of the waiting answers may fly at once."""
        prompts: set[tuple[int, ...]] = set()
        longest = count = 0
        for answer in self._waiting:
            prompts.add(answer.prompt)
            longest = max(longest, len(answer.prompt))
            if count and len(prompts) * longest + (count + 1) * self._room > self._budget:
                break
            count += 1
        return count

    def _affordable(self, prompt: tuple[int, ...]) -> bool:
        flying = {row.prompt for row in self._answers if row} | {prompt}
        return len(flying) * max(map(len, flying)) + len(self._answers) * self._room <= self._budget

    def _widen(self) -> None:
        """Double the room for own tokens. The youngest answers go back to wait where the budget has no place for all."""
        self._room = min(self._limit, 2 * self._room)
        living = [number for number, row in enumerate(self._answers) if row is not None]
        flying = {row.prompt for row in self._answers if row}
        fit = max(1, (self._budget - len(flying) * max(map(len, flying))) // self._room)
        order = sorted(living, key=lambda number: -int(self._rows.counts[number]))
        for number in reversed(order[fit:]):
            answer = self._answers[number]
            assert answer is not None
            self._waiting.appendleft(answer)
        self._resize(sorted(order[:fit]), 0)
        self._seat_prompts()

    def _resize(self, kept: list[int], fresh: int) -> None:
        self._rows = self._rows.moved(kept, fresh, self._room)
        self._answers = [*(self._answers[number] for number in kept), *[None] * fresh]

    # --- prompts ---

    def _shared_prefix(self) -> tuple[Cache | None, int]:
        """Keys and values of what all prompts begin with (instructions, worked examples): computed once."""
        prompts = list(dict.fromkeys(answer.prompt for answer in self._waiting))
        if len(prompts) < 2:
            return None, 0
        first, last, length = min(prompts), max(prompts), 0
        while length < min(len(first), len(last)) - 1 and first[length] == last[length]:
            length += 1
        return (self._decoder.prefill([first[:length]])[0], length) if length else (None, 0)

    def _prefill_from(self, answer: Answer) -> None:
        """Have the prompt's keys and values, and those of the prompts that will be seated next."""
        if answer.prompt in self._known:
            return
        together, tokens = [answer.prompt], len(answer.prompt) - self._prefix_length
        free = sum(row is None for row in self._answers)
        for number, waiting in enumerate(self._waiting):
            if number >= free or tokens >= AT_ONCE:
                break
            if waiting.prompt not in self._known and waiting.prompt != together[-1]:
                together.append(waiting.prompt)
                tokens += len(waiting.prompt) - self._prefix_length
        cache, logits = self._decoder.prefill(together, self._prefix)
        for number, prompt in enumerate(together):
            own = Cache(cache.both[:, :, number : number + 1, :, : len(prompt)].clone())
            self._known[prompt] = _Prompt(own, logits[number].clone())

    def _seat_prompts(self) -> None:
        """Put the prompts of all living rows side by side, and forget those that nobody needs any more."""
        wanted = {row.prompt for row in self._answers if row}
        still = wanted | {answer.prompt for answer in self._waiting}
        self._known = {prompt: known for prompt, known in self._known.items() if prompt in still}
        flying = [prompt for prompt in self._known if prompt in wanted]
        if not flying:
            return
        number = {prompt: n for n, prompt in enumerate(flying)}
        cache = self._decoder.cache(len(flying), max(map(len, flying)))
        for n, prompt in enumerate(flying):
            place = cache.both[:, :, n : n + 1, :, : len(prompt)]
            place.copy_(self._known[prompt].cache.both)
            self._known[prompt].cache = Cache(place)
        self._prompts = Prompts(
            cache,
            torch.tensor([len(prompt) for prompt in flying], device=self._device),
            torch.tensor([number[row.prompt] if row else 0 for row in self._answers], device=self._device),
        )
