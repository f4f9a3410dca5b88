"""Soft overlong punishment: answers near the limit lose something, before the limit takes everything."""


def overlong(length: int, limit: int, buffer: int) -> float:
    """0 up to limit − buffer tokens, then falling linearly to −1 at the limit (DAPO, arXiv 2503.14476, equation 13).

    DAPO: limit 20,480 and buffer 4,096. An answer cut at the limit has −1.

    >>> [overlong(length, 20, 4) for length in (10, 16, 17, 19, 20)]
    [0.0, 0.0, -0.25, -0.75, -1.0]
    """
    return -min(1.0, max(0, length - (limit - buffer)) / buffer) + 0.0
