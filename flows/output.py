"""What a model wrote, made harmless for a terminal: no escape sequence, no turned direction, no character that is not seen."""

import json
import re
import unicodedata


def printable(text: str) -> str:
    r"""The text with its line breaks, tabs and spaces; every other character that shows nothing is written as its escape.

    >>> print(printable("a\x1b[2Jb\u202ec"))
    a\x1b[2Jb\u202ec
    """
    return "".join(c if _shown(c) else c.encode("unicode_escape").decode() for c in text)


def printable_json(text: str) -> str:
    r"""A JSON text that means the same, with such characters as JSON escapes. They stand in its strings alone.

    >>> printable_json('{"a": "\x9b2J"}')
    '{"a": "\\u009b2J"}'
    """
    return re.sub(r"[^ -~\n]", lambda m: m[0] if _shown(m[0]) else json.dumps(m[0])[1:-1], text)


def single_line(text: str) -> str:
    r"""The whole text on one line: line breaks and tabs are written as escapes too.

    >>> print(single_line("a\nb\x1b"))
    a\nb\x1b
    """
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def one_line(text: str, most: int = 200) -> str:
    """The text on one line of at most `most` characters."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= most else f"{line[: most - 2]} …"


def _shown(character: str) -> bool:
    return character.isprintable() or character in "\n\t" or unicodedata.category(character) == "Zs"
