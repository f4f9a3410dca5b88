"""Lone surrogates: code points that a Python string can hold and that no file, tokenizer or protocol can encode."""

import re

_SURROGATE = re.compile("[\ud800-\udfff]")


def replace_surrogates(text: str) -> str:
    r"""Join surrogate pairs and replace each lone surrogate by U+FFFD, so that the text can be encoded as UTF-8.

    >>> replace_surrogates("\ud83d\ude00 \ud800"), replace_surrogates("plain")
    ('😀 �', 'plain')
    """
    if text.isascii() or _SURROGATE.search(text) is None:
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
