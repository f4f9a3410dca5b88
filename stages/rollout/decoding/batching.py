"""Answers in flight: which rows decode together, when finished ones make room for waiting ones, and what memory they take.

Keys and values are held for at most `budget` tokens (one answer runs whatever it takes). Room for the answers' own tokens
doubles when the longest needs it; where that would go over the budget, the youngest answers go back to wait and start again
(the same random numbers, so the same answer). When an eighth of the rows have finished, waiting answers take their places.
Answers that are the same so far are computed as one (prefix_sharing.py).
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.rollout.decoding.decoder import Cache, LeanDecoder
from stages.rollout.decoding.prefix_sharing import Lines
from stages.rollout.decoding.token_sampling import Choose
from stages.runtime import heartbeat

FIRST_ROOM = 64
"""Own tokens that an answer has room for at first."""
PER_ROW = ("line", "counts", "limits", "alive", "ids", "logps", "numbers")
"""What `_Rows` has of each row."""
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
    """The state of R rows, an answer each."""

    def __init__(self, rows: int, limit: int, device: torch.device) -> None:
        """Empty rows, with place for at most `limit` tokens."""
        self._limit = limit
        self.line, self.counts, self.limits = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(3))
        """(R,) the line on which it is, how many tokens were sampled, and how many may be."""
        self.alive = torch.zeros(rows, dtype=torch.bool, device=device)
        """(R,) whether an answer is there that has not ended."""
        self.ids = torch.zeros(rows, limit, dtype=torch.long, device=device)
        self.logps, self.numbers = (torch.zeros(rows, limit, device=device) for _ in range(2))
        """(R, limit) log-probabilities of the tokens `ids`, and the random numbers they are drawn with."""

    def moved(self, kept: list[int], fresh: int) -> "_Rows":
        """The kept rows, and `fresh` empty ones behind them."""
        found = _Rows(len(kept) + fresh, self._limit, self.ids.device)
        index = torch.tensor(kept, dtype=torch.long, device=self.ids.device)
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
        self._device = decoder.weight.device
        self._rows, self._lines = _Rows(0, limit, self._device), Lines(decoder, 0, self._room)

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
        """One more token for every living row."""
        if self._lines.longest >= self._room:
            self._widen()
        logits = self._lines.step(self._cache, self._prompt_lengths)
        living = self._rows.alive.nonzero().flatten()
        living = living[self._rows.line[living].argsort(stable=True)]
        lines = self._rows.line[living]
        tokens = self._write(living, logits if len(living) == len(logits) else logits[lines])
        left = self._rows.alive[living]
        self._rows.line[living[left]] = self._lines.follow(lines[left], tokens[left])

    def _write(self, rows: Tensor, logits: Tensor) -> Tensor:
        """Draw and return the next token of these living rows, and part from those that have come to their end."""
        counts = self._rows.counts[rows]
        chosen, logp = self._choose(logits.float(), self._rows.numbers[rows, counts])
        self._rows.ids[rows, counts], self._rows.logps[rows, counts] = chosen, logp
        self._rows.counts[rows] += 1
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
        return chosen

    # --- who is in flight ---

    def _take_in(self) -> None:
        """Seat waiting answers where rows have ended; when none wait, forget those rows."""
        free = [number for number, row in enumerate(self._answers) if row is None]
        if not any(self._answers):
            self._resize([], self._fitting())
            free = list(range(len(self._answers)))
        elif not free:
            return
        elif not self._waiting:
            living = [number for number, row in enumerate(self._answers) if row is not None]
            self._rows, self._answers = self._rows.moved(living, 0), [self._answers[number] for number in living]
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
            self._rows.counts[row], self._rows.alive[row] = 0, True
            self._prefill_from(answer)
            fresh.append(row)
        if not fresh:
            return
        asked = [seated.prompt for n in fresh if (seated := self._answers[n])]
        number = {prompt: n for n, prompt in enumerate(dict.fromkeys(asked))}
        rows, prompts = (torch.tensor(x, device=self._device) for x in (fresh, [number[prompt] for prompt in asked]))
        tokens = self._write(rows, torch.stack([self._known[prompt].logits for prompt in asked]))
        left = self._rows.alive[rows]
        self._rows.line[rows[left]] = self._lines.begin(prompts[left], tokens[left])
        self._seat_prompts()

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
        self._rows = self._rows.moved(kept, fresh)
        self._answers = [*(self._answers[number] for number in kept), *[None] * fresh]
        lines = self._rows.line[: len(kept)]
        self._rows.line[: len(kept)] = self._lines.follow(lines, self._lines.newest[lines])  # only the lines of those kept
        self._lines = self._lines.moved(len(kept) + fresh, self._room)

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
        """Put the prompts of all living rows side by side, and forget those that nobody needs any more.

        Every living row must have its line.
        """
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
        self._cache = cache
        self._prompt_lengths = torch.tensor([len(prompt) for prompt in flying], device=self._device)
        prompts = torch.tensor([number[row.prompt] for row in self._answers if row], device=self._device)
        self._lines.seat(self._rows.line[[row is not None for row in self._answers]], prompts)
