"""Cutting a line of texts into parts of like size, where what is shared by texts that are cut apart counts in both parts."""

import itertools
from collections.abc import Sequence


def even_parts(own: Sequence[int], prompts: Sequence[int], shares: Sequence[bool], parts: int) -> list[range]:
    """Cut n texts into `parts` ranges, the largest as small as can be, the others near their average; empty where n < parts.

    own: (n,) what each text takes by itself; prompts: (n,) what it takes besides, its prompt; shares: (n,) whether the text
    before it has what it takes besides, so that it needs only its own where that one is in the same part.
    """
    count = len(own)
    rest = [0]  # what a part takes that begins with a text and goes on to the last
    for index in reversed(range(count)):
        again = index + 1 < count and shares[index + 1]
        rest.append(rest[-1] + own[index] + prompts[index] - (prompts[index + 1] if again else 0))
    rest.reverse()

    low, high = max((a + b for a, b in zip(own, prompts, strict=True)), default=0), rest[0]
    while low < high:
        middle = (low + high) // 2
        if _needed(_reach(own, prompts, shares, middle))[0] <= parts:
            high = middle
        else:
            low = middle + 1
    reach = _reach(own, prompts, shares, high)
    needed = _needed(reach)

    ends = [0]
    for left in reversed(range(parts)):
        start, best, least = ends[-1], count, float("inf")
        if left and start < count:
            cost = prompts[start]
            for end in range(start + 1, reach[start] + 1):
                cost += own[end - 1] + (0 if end == start + 1 or shares[end - 1] else prompts[end - 1])
                # Each of the others shall have a text, if there are enough.
                if needed[end] <= left and (count - end >= left or end == start + 1):
                    larger = max(cost, rest[end] / left)
                    if larger < least:
                        best, least = end, larger
        ends.append(best)
    return [range(start, end) for start, end in itertools.pairwise(ends)]


def _reach(own: Sequence[int], prompts: Sequence[int], shares: Sequence[bool], most: int) -> list[int]:
    """(n,) where a part that begins with each text ends at the latest to take no more than `most`, which every text fits in."""
    found, end, cost = [], 0, 0
    for start in range(len(own)):
        if end == start:
            cost = prompts[start]
        while end < len(own):
            more = own[end] + (0 if end == start or shares[end] else prompts[end])
            if cost + more > most:
                break
            cost, end = cost + more, end + 1
        found.append(end)
        cost -= own[start] + prompts[start]
        if start + 1 < end and shares[start + 1]:
            cost += prompts[start + 1]
    return found


def _needed(reach: Sequence[int]) -> list[int]:
    """(n + 1,) how many parts at least the texts from each one on need."""
    found = [0]
    for start in reversed(range(len(reach))):
        found.append(1 + found[len(reach) - reach[start]])
    return found[::-1]
