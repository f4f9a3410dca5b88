"""Near-duplicates: texts whose sets of word n-grams have a Jaccard similarity of at least a threshold.

Among the answers to one problem every pair is compared. Among those of a whole dataset MinHash (datasketch) names the pairs to
compare: one at the threshold is missed with a probability of at most `MISSED`, and what is found is always compared exactly.
The hashes have fixed seeds, so the same answers give the same verdicts on every machine.
"""

import hashlib
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.contract.config import Config

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Grams = NDArray[np.uint64]

PERMUTATIONS = 128
MISSED = 1e-4
_WORD = re.compile(r"\w+|[^\w\s]")


class Duplicates(Config):
    """Which answers are near-duplicates of each other."""

    similarity: float = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity of the n-grams from which on two answers are near-duplicates."""
    words: int = Field(default=5, ge=1)
    """Length of the n-grams in words; a number or a sign is a word of its own, case does not count."""
    among: Literal["problem", "dataset"] = "problem"
    """Whether an answer is compared with the chosen ones of its own problem, or with all chosen before it (memory: about
    10 kB for each)."""


def grams(text: str, words: int) -> "Grams":
    """The distinct word n-grams of a text as sorted hashes; a shorter text is one n-gram, an empty one has none."""
    import numpy as np

    found = _WORD.findall(text.casefold())
    last = max(1, len(found) - words + 1) if found else 0
    sequences = {" ".join(found[start : start + words]) for start in range(last)}
    encoded = (sequence.encode("utf-8", "surrogatepass") for sequence in sequences)
    hashes = [int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") for content in encoded]
    return np.array(sorted(set(hashes)), dtype=np.uint64)


def similarity(a: "Grams", b: "Grams") -> float:
    """|a ∩ b| / |a ∪ b|; two empty sets are the same.

    >>> similarity(grams("one two three four", 2), grams("one two three five", 2))
    0.5
    """
    import numpy as np

    shared = len(np.intersect1d(a, b, assume_unique=True))
    union = len(a) + len(b) - shared
    return shared / union if union else 1.0


def bands(threshold: float) -> tuple[int, int]:
    """Bands and rows of the index: as many rows as still let no more than `MISSED` of the pairs at the threshold pass.

    >>> bands(0.8)
    (25, 5)
    """
    fits = [r for r in range(1, PERMUTATIONS + 1) if (1 - threshold**r) ** (PERMUTATIONS // r) <= MISSED]
    rows = max(fits, default=1)
    return PERMUTATIONS // rows, rows


class Finder:
    """Remembers what was chosen, and says what comes too near to it."""

    def __init__(self, settings: Duplicates, folder: Path) -> None:
        """`folder`: where the n-grams of a whole dataset lie while they are needed."""
        self._settings, self._folder = settings, folder
        self._chosen: list[Grams] = []
        self._index = _Index(settings, folder) if settings.among == "dataset" else None

    def next_problem(self) -> None:
        """What follows answers another problem."""
        self._chosen = []

    def near(self, text: str) -> bool:
        """Whether the text is a near-duplicate of one that was chosen; if not, it is chosen itself."""
        own = grams(text, self._settings.words)
        if self._index is not None:
            return self._index.near(own)
        if any(similarity(own, other) >= self._settings.similarity for other in self._chosen):
            return True
        self._chosen.append(own)
        return False


class _Index:
    """The chosen answers of a whole dataset: their bands in memory, their n-grams in a file without a name."""

    def __init__(self, settings: Duplicates, folder: Path) -> None:
        from datasketch import MinHashLSH

        folder.mkdir(parents=True, exist_ok=True)
        self._threshold = settings.similarity
        self._bands = MinHashLSH(threshold=settings.similarity, num_perm=PERMUTATIONS, params=bands(settings.similarity))
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - as long as the index; the system removes it
        self._ends = [0]

    def near(self, own: "Grams") -> bool:
        from datasketch import MinHash

        sketch = MinHash(PERMUTATIONS, seed=1, hashfunc=_low_bits)
        sketch.update_batch(own.tolist())
        if any(similarity(own, self._read(number)) >= self._threshold for number in sorted(self._bands.query(sketch))):
            return True
        self._bands.insert(len(self._ends) - 1, sketch, check_duplication=False)
        self._file.seek(self._ends[-1])
        self._ends.append(self._ends[-1] + self._file.write(own.tobytes()))
        return False

    def _read(self, number: int) -> "Grams":
        import numpy as np

        self._file.seek(self._ends[number])
        return np.frombuffer(self._file.read(self._ends[number + 1] - self._ends[number]), dtype=np.uint64)


def _low_bits(hashed: int) -> int:
    return hashed & 0xFFFFFFFF
