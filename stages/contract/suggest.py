"""The known name nearest to one that is not known."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """A mend: the nearest known name, or all of them when none is near.

    >>> nearest("clip_hihg", ["clip_low", "clip_high"])
    'did you mean `clip_high`?'
    >>> nearest("x", ["a", "b"])
    'known: a, b'
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known)}"
