r"""Final answers as one plain notation: Markdown, LaTeX layout and Unicode signs are taken off, the meaning stays.

Total: any Unicode string in, a string out. Digits are ASCII digits; digits of other scripts stay the letters that they are.

>>> plain_text("**73**."), plain_text(r"12\,345"), plain_text("x²−½"), plain_text(r"\mathrm{cm}")
('73', '12345', 'x^{2}-\\frac{1}{2}', 'cm')
"""

import re

_TRANSLATION = str.maketrans(
    dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u200e\u200f\u2066\u2067\u2068\u2069\u202a\u202b\u202c\u202d\u202e\u00ad", "")
    | dict.fromkeys("\u00a0\u2002\u2003\u2007\u3000\t\n\r\v\f", " ")
    | dict.fromkeys("\u2009\u200a\u202f\u2006\u2005\u2004", r"\,")
    | dict.fromkeys("−‐‑‒–—﹣－", "-")
    | dict.fromkeys("‘’ʼ`´", "'")
    | dict.fromkeys("“”„", '"')
    | {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if code != 0xFF0D}
    | {
        "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "∙": r"\cdot ", "∗": "*", "÷": "/", "⁄": "/", "∕": "/", "√": r"\sqrt ",
        "∛": r"\sqrt[3]", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ",
        "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "∖": r"\setminus ",
        "°": r"^\circ ", "º": r"^\circ ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}",
        "ℂ": r"\mathbb{C}", "…": r"\ldots ", "⋯": r"\ldots ", "±": r"\pm ", "∓": r"\mp ", "′": "'", "″": "''", "∣": r"\mid ",
        "⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
        "∠": r"\angle ", "‰": r"\permil ", "、": ",", "。": ".", "∨": r"\lor ", "∧": r"\land ", "µ": "μ", "℃": r"^\circ C",
        "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
        "⅕": r"\frac{1}{5}", "⅖": r"\frac{2}{5}", "⅗": r"\frac{3}{5}", "⅘": r"\frac{4}{5}", "⅙": r"\frac{1}{6}",
        "⅚": r"\frac{5}{6}", "⅛": r"\frac{1}{8}", "⅜": r"\frac{3}{8}", "⅝": r"\frac{5}{8}", "⅞": r"\frac{7}{8}",
        "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "ε": r"\epsilon ", "θ": r"\theta ",
        "λ": r"\lambda ", "ρ": r"\rho ", "σ": r"\sigma ", "τ": r"\tau ", "φ": r"\phi ", "ϕ": r"\phi ", "ω": r"\omega ",
        "Δ": r"\Delta ", "Ω": r"\Omega ",
    }
)  # fmt: skip
_SUPERSCRIPTS, _SUBSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙᵢ"
_RAISED = str.maketrans(_SUPERSCRIPTS + _SUBSCRIPTS, "0123456789+-()ni" * 2)
_SUPERSCRIPT, _SUBSCRIPT = re.compile(f"[{_SUPERSCRIPTS}]+"), re.compile(f"[{_SUBSCRIPTS}]+")

_EMPHASIS = re.compile(r"(?<![\w)\]}*])(\*\*|__)(?=[^\s*_])(.+?)(?<=[^\s])\1(?![\w(*])")
_WRAPPED = (
    ("**", "**"), ("__", "__"), ("*", "*"), ("_", "_"), ("$$", "$$"), ("$", "$"),
    (r"\(", r"\)"), (r"\[", r"\]"), ('"', '"'), ("'", "'"),
)  # fmt: skip
_WRAPPING_COMMAND = re.compile(r"\\(?:boxed|fbox|text|ensuremath)\s*\{")
_TEXT_COMMAND = re.compile(
    r"\\(?:text(?:rm|bf|it|tt|sf|up|normal|sc)|mbox|hbox|emph|mathrm|mathit|mathsf|mathtt|operatorname\*?)\b\s*(?=\{)"
)
_LAYOUT = re.compile(
    r"\\(?:left|right)\s*\.|\\!"
    r"|\\(?:left|right|bigl?|bigr|Bigl?|Bigr|biggl?|biggr|Biggl?|Biggr|displaystyle|textstyle|limits|nolimits)(?![A-Za-z])"
)
_BOLD = re.compile(r"\\(?:mathbf|boldsymbol|bm|vec|overrightarrow|mathcal|bold|pmb|textcolor\{[a-z]+\})\s*(?=[{A-Za-z\\])")
_THIN = re.compile(r"(?<=[0-9])(?:\\[,;: ]|~|\{,\}|\{\\,\})(?=[0-9]{3}(?![0-9]))")
_SPACE = re.compile(
    r"(?<!\\)\\[,;:> ]|~|\\(?:quad|qquad|thinspace|enspace|space|hfill|nobreakspace)(?![A-Za-z])|\\[hv]space\{[^{}]*\}"
)
_SPACED_GROUPS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9]|\s*/|\s*\\frac)")
_RENAMED = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![A-Za-z])"), r"\\binom"),
    (re.compile(r"\\(?:leqslant|leq|leqq)(?![A-Za-z])|<=|=<"), r"\\le "),
    (re.compile(r"\\(?:geqslant|geq|geqq)(?![A-Za-z])|>=|=>"), r"\\ge "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:neq|not\s*=)(?![A-Za-z])|!=(?!=)"), r"\\ne "),
    (re.compile(r"\\(?:dots|dotsc|cdots|dotsb|dotsm)(?![A-Za-z])|\.\.\.+"), r"\\ldots "),
    (re.compile(r"\\(?:varnothing|empty)(?![A-Za-z])"), r"\\emptyset "),
    (re.compile(r"\\(?:lbrace)(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\(?:rbrace)(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:lvert|rvert|vert)(?![A-Za-z])"), "|"),
    (re.compile(r"\\(?:degree|degrees)(?![A-Za-z])|\\text\{\s*degrees?\s*\}"), r"^\\circ "),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}"), r"^\\circ "),
    (re.compile(r"\\(?:thickapprox|simeq|doteq)(?![A-Za-z])"), r"\\approx "),
    (re.compile(r"\\(?:Bbb|mathbb)\s*\{?\s*([RZNQC])\s*\}?"), r"\\mathbb{\1}"),
    (re.compile(r"\\(?:backslash)(?![A-Za-z])"), r"\\setminus "),
    (re.compile(r"\\(?:colon|ratio)(?![A-Za-z])"), ":"),
    (re.compile(r"\\(?:var)(phi|theta|epsilon|rho|sigma)(?![A-Za-z])"), r"\\\1 "),
    (re.compile(r"(?<=[0-9])\s*[xX]\s*(?=10\s*\^)|(?<=[0-9]) [xX] (?=[0-9])"), r"\\times "),
    (re.compile(r"\{?([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}?"), r"\\binom{\1}{\2}"),
    (re.compile(
    r"\\p?(?:b?mod|mod)\s*\{\s*([^{}]*?)\s*\}|\(\s*\\?b?mod\s+([^()]*?)\s*\)|\\[pb]?mod\s+([0-9A-Za-z]+)"
), r"\\pmod{\1\2\3}"),
    (re.compile(r"\\text\{\s*\}"), " "),
    (re.compile(r"\\tag\*?\{[^{}]*\}"), ""),
    (re.compile(r"\\(?:strut|nonumber|notag)(?![A-Za-z])"), ""),
)  # fmt: skip
_PREFACE = re.compile(
    r"(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+|correct\s+)?(?:answer|ans|result|solution)(?:\s+is\s*:|\s+is(?![A-Za-z])|\s*:|\s*=)\s*(?=\S)",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
"""A word that is no LaTeX command."""
CURRENCY = "¤"
"""Stands for a dollar sign that means money."""


def plain_text(text: str) -> str:
    r"""Rewrite an answer in plain notation: Markdown emphasis, math delimiters, spacing, fonts and Unicode signs normalised.

    A dollar sign that opens no formula becomes `¤`; `\text{...}` stays where it is not the whole.
    """
    text = text.replace("```", " ").replace("`", " ")
    text = _SUPERSCRIPT.sub(lambda m: "^{" + m[0].translate(_RAISED) + "}", text)
    text = _SUBSCRIPT.sub(lambda m: "_{" + m[0].translate(_RAISED) + "}", text)
    text = text.translate(_TRANSLATION)
    text = _boxes_apart(text)
    text = _TEXT_COMMAND.sub(r"\\text", text)
    text = text.replace(r"\$", CURRENCY)
    previous = None
    while previous != text:
        previous, text = text, _unwrapped(text.strip())
    text = _EMPHASIS.sub(r"\2", text)
    text = text.replace("$", CURRENCY if text.count("$") == 1 else " ")
    text = text.replace(r"\(", " ").replace(r"\)", " ")
    text = _LAYOUT.sub("", text)
    for pattern, written in _RENAMED:
        text = pattern.sub(written, text)
    text = _BOLD.sub("", text)
    text = _THIN.sub("", text)
    text = _SPACE.sub(" ", text)
    text = " ".join(text.split())
    text = _SPACED_GROUPS.sub(lambda m: m[0].replace(" ", ""), text)
    previous = None
    while previous != text:
        previous, text = (
            text,
            _PREFACE.sub("", _unwrapped(text.strip()), count=1) if _PREFACE.match(text) else _unwrapped(text.strip()),
        )
    return text


def closing(text: str, start: int, left: str = "{", right: str = "}") -> int:
    """Index of the bracket that closes the one at `start`, or -1. Escaped brackets do not count."""
    depth, position = 0, start
    while position < len(text):
        char = text[position]
        if char == "\\" and position + 1 < len(text):
            position += 2
            continue
        depth += (char == left) - (char == right)
        if depth == 0:
            return position
        position += 1
    return -1


def _unwrapped(text: str) -> str:
    """Without the outermost wrapper and a full stop at the end."""
    if text.endswith((".", ",", ";", ":")) and not text.endswith((r"\,", r"\;", r"\:", "..")):
        text = text[:-1].rstrip()
    for left, right in _WRAPPED:
        inner = text[len(left) : len(text) - len(right)]
        if text.startswith(left) and text.endswith(right) and inner.strip() and left not in inner and right not in inner:
            return inner.strip()
    if (match := _WRAPPING_COMMAND.match(text)) is not None and closing(text, match.end() - 1) == len(text) - 1:
        return text[match.end() : -1].strip()
    if text.startswith("{") and closing(text, 0) == len(text) - 1:
        return text[1:-1].strip()
    return text


def _boxes_apart(text: str) -> str:
    """Contents of the boxes: several are several answers, with commas between them; of a sentence with one, the box alone."""
    contents, position, before = [], 0, ""
    while (match := _BOX.search(text, position)) is not None:
        end = closing(text, match.end() - 1)
        if end < 0:
            return text
        before = before or text[: match.start()]
        contents.append(text[match.end() : end])
        position = end + 1
    sentence = len(_PROSE.findall(before)) > 1
    return ", ".join(contents) if len(contents) > 1 or (contents and sentence) else text
