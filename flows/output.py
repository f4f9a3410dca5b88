"""What commands print: the JSON document, tables, and text that a model wrote, made harmless for a terminal.

Harmless: no escape sequence, no turned direction, no character that is not seen.
"""

import json
import re
import sys
import unicodedata
from typing import Any


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


def print_json(document: dict[str, Any]) -> None:
    """The only thing that a command with `--json` writes on standard output."""
    text = json.dumps(document, indent=2, ensure_ascii=not _is_unicode(sys.stdout.encoding))
    sys.stdout.write(printable_json(text) + "\n")
    sys.stdout.flush()


def _is_unicode(encoding: str | None) -> bool:
    return encoding is None or encoding.lower().replace("-", "").startswith("utf")


def table(head: list[str], rows: list[list[str]], *, right: bool = True) -> str:
    """Columns as wide as their widest cell; with `right`, all but the first stand on the right, as figures do."""
    head, *rows = ([single_line(cell) for cell in row] for row in (head, *rows))  # a value may hold anything
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def text(row: list[str]) -> str:
        cells = zip(row, widths, range(len(row)), strict=True)
        return "  ".join(cell.rjust(w) if right and i else cell.ljust(w) for cell, w, i in cells).rstrip()

    return "\n".join([text(head), "  ".join("-" * w for w in widths), *map(text, rows)])
