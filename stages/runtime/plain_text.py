"""Text for streams that cannot show every character (an ASCII or Latin-1 terminal): plain characters in place of an error."""

import codecs
import functools
import sys
import unicodedata

HANDLER = "r1-plain"
"""Name of the error handler for encoding."""
_PLAIN = {
    **dict.fromkeys("\u2018\u2019\u201a\u2032", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u2033", '"'),
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\u2500\u2501\u2574", "-"),
    **dict.fromkeys("\u2502\u2503", "|"),
    "\u2044": "/",
    "\u00d7": "x",
    "\u00b7": "*",
    "\u2022": "*",
    "\u2026": "...",
    "\u2190": "<-",
    "\u2192": "->",
    "\u2264": "<=",
    "\u2265": ">=",
    "\u2248": "~",
    "\u00b1": "+-",
    "\u03c3": "sigma",
    "\u00df": "ss",
}


def plain(text: str) -> str:
    r"""ASCII characters that say the same as far as there are any, else the escape of a character.

    >>> plain("1\u20132 \u00d7 caf\u00e9 \u2026 \u4e2d"), plain("x\u00b2")
    ('1-2 x cafe ... \\u4e2d', 'x2')
    """
    return "".join(map(_plain_character, text))


@functools.lru_cache(maxsize=4096)  # a text has few different characters, and some take 6 µs
def _plain_character(character: str) -> str:
    if character.isascii():
        return character
    parts = unicodedata.normalize("NFKD", character)
    shown = "".join(_PLAIN.get(part, part) for part in parts if not unicodedata.combining(part))
    return shown if shown.isascii() and shown else character.encode("unicode_escape").decode()


def _handle(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return plain(error.object[error.start : error.end]), error.end


codecs.register_error(HANDLER, _handle)


def survive_any_encoding() -> None:
    """Have standard output and standard error write plain characters for those that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # not the file of our own, or of a test's, that stands in for it
            reconfigure(errors=HANDLER)
