"""The repetition penalty: how much of a text is word sequences that it has had before.

The paper has none; its cold start drops answers that repeat themselves. Rewarding accuracy alone, long answers come to loop
(Demystifying Long Chain-of-Thought Reasoning, arXiv 2502.03373, section 4.3, which punishes repeated 40-grams of tokens).
"""

import re


def repetition(text: str, words: int) -> float:
    """Minus the share of sequences of `words` words that stood earlier in the text: 0 (none) to nearly −1 (a loop).

    >>> repetition("one two three four", 2), repetition("a b a b a", 2), repetition("too short", 8)
    (0.0, -0.5, 0.0)
    """
    found = [word for word in re.split(r"[\s,]+", text) if word]
    sequences = [tuple(found[i : i + words]) for i in range(len(found) - words + 1)]
    return len(set(sequences)) / len(sequences) - 1.0 if sequences else 0.0
