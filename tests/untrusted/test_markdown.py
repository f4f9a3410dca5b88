"""Hostile texts in Markdown: a remark stays one item of its list, a label one cell, a configuration one block."""

import re

import pytest
from hypothesis import given, settings
from markdown_it import MarkdownIt

from flows.output import single_line
from flows.runs.markdown import escaped, fenced
from tests.untrusted.texts import FRAGMENTS, TEXTS

MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table")
PLAIN = {"text", "text_special"}


def inline_text(source):
    """The types of the blocks of a source, and the text of its inline content when that is plain, else None."""
    tokens = MARKDOWN.parse(source)
    children = [child for token in tokens for child in token.children or []]
    text = "".join(child.content for child in children) if {child.type for child in children} <= PLAIN else None
    return [token.type for token in tokens if token.nesting >= 0], text


def check(text):
    blocks, shown = inline_text(f"- {escaped(text)}x")
    assert blocks == ["bullet_list_open", "list_item_open", "paragraph_open", "inline"], ascii(text)
    assert shown is not None, ascii(text)
    assert re.sub(r"\s+", " ", shown) == re.sub(r"\s+", " ", f"{single_line(text).strip()}x"), ascii(text)


@settings(max_examples=60, derandomize=True, database=None, deadline=None)
@given(TEXTS)
def test_escaped_text_is_plain_in_one_list_item(text):
    check(text)


@pytest.mark.parametrize(
    "text", ["", "- a", "1. a", "1) a", "+ a", "= a", "---", "***", "    code", "# h", "> q", "| a |", "a\n\n# h"]
)
def test_escaped_text_begins_no_block(text):
    check(text)


def test_escaped_fragments_stay_in_their_table_cell():
    for text in FRAGMENTS:
        blocks, _ = inline_text(f"| a | b |\n|---|---|\n| {escaped(text)} | 1 |")
        assert blocks.count("td_open") == 2, ascii(text)


@settings(max_examples=60, derandomize=True, database=None, deadline=None)
@given(TEXTS)
def test_fenced_text_is_one_block(text):
    seen = "".join(c for c in text if c.isprintable() or c == "\n")
    tokens = MARKDOWN.parse(f"before\n\n{fenced(seen, 'yaml')}\n\nafter")
    assert [token.type for token in tokens if token.nesting >= 0] == [
        "paragraph_open",
        "inline",
        "fence",
        "paragraph_open",
        "inline",
    ]
