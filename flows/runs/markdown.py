"""Texts of users and models in Markdown: shown as they are, on the line and in the cell or block where they were put."""

import re

from flows.output import single_line

_SPECIAL = re.compile(r"([\\`*_\[\]{}<>#|~!&$])")
_LEADING = re.compile(r"^([0-9]*)([-+=.)])")
"""What begins a list or underlines a heading at the start of a line."""


def escaped(text: str) -> str:
    r"""The text on one line, with every character escaped that Markdown, or HTML within it, acts on.

    >>> print(escaped("a|b\n[x](javascript:1) <b>"))
    a\|b\\n\[x\](javascript:1) \<b\>
    """
    inline = _SPECIAL.sub(r"\\\1", single_line(text).strip())
    return _LEADING.sub(r"\1\\\2", inline)


def fenced(text: str, language: str = "") -> str:
    """The text as a code block, whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
