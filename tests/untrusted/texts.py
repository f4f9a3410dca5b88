"""Hostile texts: Hypothesis strategies, a fast seeded generator, and megabyte inputs against slow algorithms.

A policy can sample any of these. Three groups of ingredients matter: characters that Python's text predicates accept and
its number parsers reject (`²`, `½`, `①`), characters that cannot be encoded or shown (lone surrogates, NUL, bidirectional
controls), and structure that makes a parser recurse or a regular expression backtrack.
"""

import random

from hypothesis import strategies as st

DIGITS = ("²", "³", "½", "¾", "①", "⑳", "٣", "१", "৪", "５", "𝟛", "Ⅷ", "〇", "万", "㊿", "🄌", "፩", "౦", "᠙", "꘩", "߁")
"""Characters that some of `isdigit`, `isnumeric`, `isdecimal` or `\\d` accept, and `int` or `float` may not."""
INVISIBLE = (
    "\x00", "\x1b[2J", "\x1b]0;title\x07", "\x9b2J", "\r", "\r\n", "\x08", "\x7f", "\x85", "\u2028", "\u2029", "\u202e",
    "\u2066",
    "\u2069", "\u200b", "\u200d", "\u061c", "\ufeff", "\ufffe", "\uffff", "\U0010ffff", "\u0300" * 9, "\U000e0041", "\xad",
)  # fmt: skip
"""Controls, separators, directions, marks: what turns a terminal, a page or a line format around."""
SURROGATES = ("\ud800", "\udfff", "\udcff", "\ud83d", "\ude00\ud83d", "\ud800\udc00")
TAGS = (
    "<think>", "</think>", "<answer>", "</answer>", "<think></think>", "</answer><answer>", "<Think>", "< think >",
    "<|im_end|>",
    "<|endoftext|>", "</s>", "[INST]", "<answer", "think>", "</",
)  # fmt: skip
NUMBERS = (
    "0", "-0", "1", "42", "1,000.99", "1,000.99m²", "3/4", "1 1/2", "0.1", ".5", "5.", "1e5", "1e999999999",
    "-1e-999999999", "1/0",
    "9" * 40, "0x1f", "1_000", "52_8", "52_{8}", "1_99999", "NaN", "inf", "-Infinity", "2^{2015}", "10^{10^{10}}",
    "9**9**9", "100!",
    "((5!)!)!", "12:30", "50%", "$5", "£3.50", "−7", "12\\,345", "1 2 3", "1/2/3", "++1", "1,,1", "1.2.3", "2²", "x²",
    "5 cm³",
)  # fmt: skip
LATEX = (
    r"\boxed{", r"\boxed{5}", r"\fbox{", "}", "{", r"\frac{1}{2}", r"\frac{", r"\dfrac12", r"\sqrt{2}", r"\sqrt[",
    r"\left(", r"\right)",
    r"\text{June 20}", r"\text{", r"\{1,2\}", "(1,2]", r"(-\infty, 2)", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{",
    r"\\",
    "$", "$$", r"\(", r"\)", r"\[", r"\pi", r"\binom{100000}{5}", r"\sum_{k=1}^{10000000} k", "^{", "_{", "^^", "=",
    "\\", r"x \in",
    r"\cup", r"\pm", "x+1", "sin(x)", "!", "|", "∞", "≤", r"\le", "<", ">",
)  # fmt: skip
CODE = (
    "```python\n", "```", "```py\nprint(1)\n```", "````", "def f(x):\n    return x\n", "import os\n", "assert f(1) == 2",
    "__import__('os')",
    "lambda: 0", "open('f')", "eval(", "'''", "\\\n", "\t", "    ", "#", "[" * 20, "(" * 20, "1+" * 20, "f'{", "print(\"",
)  # fmt: skip
MARKUP = (
    "</script><script>alert(1)</script>", "<!--", "]]>", "&amp;", "&#0;", "{{ 7*7 }}", "{% raw %}", "{#", "| a | b |", "|",
    "`", "[x](javascript:1)",
    "![](http://x/)", "\n# head", "\n---\n", "\n- item", "**5**", "__5__", "[bold red]", "[/]", "\\[",
    "<img src=x onerror=1>", "%s", "%(x)s", "{0}",
    "=cmd()", "@SUM(1)", "'", '"', ";", "--", "\\u0000", "\\ud800", "$HOME", "`id`", "a,b", '{"a": 1}', "null",
)  # fmt: skip
WORDS = (
    "so ", "Wait, ", "but ", "the answer is ", "however", "and ", "or ", "half ", "dollars ", "第一步，", "ответ ", "あい",
    "한국어 ", "naïve ", "ﷺ",
    "ſt", "ß", "İ", "ǆ", "e\u0301", "’", "'", "a'a'a", " ", "\n", "\n\n", "\u3000", "\xa0", ". ", "! ", "。", "word " * 9,
)  # fmt: skip
FRAGMENTS = (*DIGITS, *INVISIBLE, *SURROGATES, *TAGS, *NUMBERS, *LATEX, *CODE, *MARKUP, *WORDS)
BLOCKS = (
    (0, 0x80),
    (0x80, 0x250),
    (0x300, 0x370),
    (0x600, 0x700),
    (0x2000, 0x2100),
    (0x2460, 0x2500),
    (0x3000, 0x3100),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0xD800, 0xE000),
    (0xFB50, 0xFE00),
    (0xFF00, 0x10000),
    (0x1D400, 0x1D800),
    (0x1F000, 0x1FA00),
    (0, 0x110000),
)

_any_character = st.characters(exclude_categories=())
_piece = st.one_of(
    st.sampled_from(FRAGMENTS),
    st.text(_any_character, max_size=6),
    st.integers().map(str),
    st.fractions().map(str),
    st.floats().map(str),
    st.builds(lambda piece, n: piece * n, st.sampled_from(FRAGMENTS), st.sampled_from([2, 3, 30, 120])),
)
SOUP: st.SearchStrategy[str] = st.lists(_piece, max_size=12).map("".join)
"""Fragments and characters in any order."""


def framed(thought: str, answer: str) -> str:
    """The paper's format around any two texts."""
    return f"<think>{thought}</think> <answer>{answer}</answer>"


TEXTS: st.SearchStrategy[str] = st.one_of(
    st.text(_any_character, max_size=40),
    SOUP,
    st.builds(framed, SOUP, SOUP),
    st.builds(lambda text, end: text[: max(0, len(text) - end)], st.builds(framed, SOUP, SOUP), st.integers(0, 30)),
    SOUP.map(lambda text: f"so it is \\boxed{{{text}}}."),
    SOUP.map(lambda text: f"<think>code</think><answer>```python\n{text}\n```</answer>"),
)
"""Sampled texts: all of Unicode with lone surrogates, tag soup, well-formed answers, truncated ones, boxes, programs."""


def random_text(generator: random.Random) -> str:
    """One text like those of `TEXTS`, about a hundred times faster than Hypothesis draws one."""

    def piece() -> str:
        kind = generator.random()
        if kind < 0.7:
            return generator.choice(FRAGMENTS)
        if kind < 0.85:
            low, high = generator.choice(BLOCKS)
            return "".join(chr(generator.randrange(low, high)) for _ in range(generator.randrange(1, 7)))
        if kind < 0.95:
            return str(generator.randrange(-(10 ** generator.randrange(1, 30)), 10 ** generator.randrange(1, 30)))
        return generator.choice(FRAGMENTS) * generator.choice((2, 3, 30, 120))

    def soup() -> str:
        return "".join(piece() for _ in range(generator.randrange(0, 9)))

    kind = generator.random()
    if kind < 0.25:
        return soup()
    if kind < 0.7:
        return framed(soup(), soup())
    if kind < 0.8:
        return f"{soup()}\\boxed{{{soup()}}}"
    if kind < 0.9:
        text = framed(soup(), soup())
        return text[: generator.randrange(len(text))]
    if kind < 0.999:
        return framed(soup(), piece())
    return framed(soup() * generator.randrange(1, 500), soup() * generator.randrange(1, 500))


PATTERNS = {
    "digits": "9", "superscripts": "²", "arabic digits": "٣", "grouped": "1,111", "ones and spaces": "1 ",
    "fractions": "1/", "points": "1.",
    "minus signs": "-", "mixed numbers": "1 1/", "units": "5 a/abc", "letters": "a", "letters and points": "a.",
    "apostrophes": "a'",
    "spaces": " ", "line feeds": "\n", "blank lines": "\n ", "carriage returns": "\r", "separators": "\u2028",
    "nul": "\x00", "escape": "\x1b[2J",
    "surrogates": "\ud800", "marks": "\u0300", "mixed marks": "\u0300\u0323\u0345", "bidi": "\u202e", "emoji": "👩\u200d",
    "parentheses": "(",
    "braces": "{", "brackets": "[", "closing braces": "}", "boxes": "\\boxed{", "boxes and spaces": "\\boxed ",
    "latex fractions": "\\frac{",
    "latex fractions and spaces": "\\frac {1 } ", "backslashes": "\\", "powers": "2^", "factorials": "!", "dollars": "$",
    "equals": "1=",
    "think": "<think>", "answers": "<answer>", "closed answers": "</answer>", "nearly a tag": "<answer",
    "fences": "```python\n", "sums": "1+",
    "bars": "|", "backticks": "`", "markup": "<b>&", "sentence ends": ". ", "sentences": "We add. ", "words": "word ",
    "same line": "abc, ",
    "han": "第", "kana": "あ", "jinja": "{{ ", "json": '{"a":', "quotes": '"', "expanding": "ﷺ", "addresses": "a://a:a@",
}  # fmt: skip


def large_texts(size: int) -> dict[str, str]:
    """Name -> about `size` characters of one pattern: what a slow algorithm or a deep recursion meets."""
    repeated = {name: (piece * (size // len(piece) + 1))[:size] for name, piece in PATTERNS.items()}
    return repeated | {
        "a number and spaces": "1" + " " * size + "x",
        "a latex fraction and spaces": "\\frac{ 1" + " " * size,
        "a sentence end and spaces": "." + " " * size + "x",
        "a line feed and spaces": "\n" + " " * size + "x",
        "nested boxes": "\\boxed{" * (size // 16) + "}" * (size // 16),
        "nested parentheses": "(" * (size // 2) + "1" + ")" * (size // 2),
        "different words": " ".join(map(str, range(size // 7))),
        "points and a password": "a." * (size // 2) + "@",
    }


def surrogate_free(text: str) -> bool:
    """Whether a text can be encoded."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
