"""Digits are read as ASCII: a scan of the whole source for predicates and classes that also accept `²`, `½`, `①` or `٣`.

`"²".isdigit()` is true and `float("²")` raises; `\\d` accepts every script's decimal digits, whose logarithm or text is not
what the code after it expects. Where another script is meant, the place is listed below with the reason.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PREDICATES = {"isdigit", "isdecimal", "isnumeric", "isalnum", "isalpha"}
CLASS = re.compile(r"(?<!\\)(?:\\\\)*\\([dDwW])(?![A-Za-z])")
"""A class of a regular expression; `\\dfrac` and the like are LaTeX."""

WORDS_OF_ANY_SCRIPT = "letters and words of any script are meant; nothing is converted to a number"
ALLOWED: dict[str, dict[str, str]] = {
    "stages/curation/duplicates.py": {r"\w+|[^\w\s]": WORDS_OF_ANY_SCRIPT},
    "stages/rewards/language.py": {r"]|[^\W\d_": WORDS_OF_ANY_SCRIPT, r"]+(?:['’][^\W\d_": WORDS_OF_ANY_SCRIPT},
    "stages/problems/ngrams.py": {
        r"]|[^\W_": WORDS_OF_ANY_SCRIPT,
        r"\d+(?:\.\d+)+|[": "numbers of any script are compared as texts",
        r"(?<=\d),(?=\d{3}(?!\d))": "numbers of any script are compared as texts",
        "isalpha": WORDS_OF_ANY_SCRIPT,
        "isdecimal": "numbers of any script are compared as texts",
    },
    "stages/problems/columns.py": {
        r"[-+]?\d+": "int() reads the decimal digits of every script",
        r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?": "float() reads the decimal digits of every script",
    },
    "stages/rewards/answers/numbers.py": {r"\b(?:[^mgshLC": WORDS_OF_ANY_SCRIPT, r"(?<![\w).])": WORDS_OF_ANY_SCRIPT},
    "stages/rewards/answers/amounts.py": {"isalnum": WORDS_OF_ANY_SCRIPT, "isalpha": WORDS_OF_ANY_SCRIPT},
    "stages/rewards/answers/text.py": {r"(?<![\w)\]}*])": WORDS_OF_ANY_SCRIPT},
    "stages/rewards/answers/form_reader.py": {
        "isdigit": "asked of ASCII characters alone",
        "isalnum": WORDS_OF_ANY_SCRIPT,
        "isalpha": WORDS_OF_ANY_SCRIPT,
    },
    "stages/rewards/answers/formula.py": {
        "isdigit": "asked of ASCII characters alone",
        "isalnum": "asked of ASCII characters alone",
        "isalpha": WORDS_OF_ANY_SCRIPT,
    },
    "stages/rewards/code/verifier.py": {r"[^\W\d]\w*(\.[^\W\d]\w*)*": "Python's identifiers may have letters of any script"},
    "stages/rewards/settings.py": {
        r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$": "Python's identifiers may have letters of any script",
    },
    "stages/kinds/dataset.py": {r"<\|\w+\|>|\[/?INST\]": "names of special tokens may have letters of any script"},
    "stages/contract/secrets.py": {"": "keys are recognised generously: what is masked needlessly does no harm"},
    "stages/evals/task.py": {r"[^\w/. -]": "MLflow's names may have letters of any script; metric_name makes them ASCII"},
    "stages/tracking/mlflow/artifacts.py": {r"[^\w-]": "MLflow's names of models may have letters of any script"},
    "flows/cli/compare.py": {r"[^\w.-]": "file names may have letters of any script"},
}
"""File -> a part of a string constant of the source, or the predicate's name -> why more than ASCII is meant."""


def findings(source: str) -> list[tuple[int, str]]:
    """(line, text) of each predicate, and of each string constant with a class that is not limited to ASCII."""
    if not any(sign in source for sign in (*PREDICATES, r"\d", r"\D", r"\w", r"\W")):
        return []  # without parsing
    tree = ast.parse(source)
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    ascii_only = {
        id(part)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and any("ASCII" in ast.unparse(word.value) for word in call.keywords)
        for part in ast.walk(call)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in PREDICATES:
            found.append((node.lineno, node.attr))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | ascii_only:
            found += [(node.lineno, node.value)] if CLASS.search(node.value) else []
    return found


def allowed(name: str, text: str) -> bool:
    """Whether a finding is listed."""
    return any(part in text if text not in PREDICATES else part == text for part in ALLOWED.get(name, {}))


SOURCES = sorted(path for package in ("stages", "flows") for path in (ROOT / package).rglob("*.py"))


def test_scan_of_sources_finds_no_unicode_digit_predicate_outside_the_list():
    found = {
        f"{path.relative_to(ROOT)}:{line}": text
        for path in SOURCES
        for line, text in findings(path.read_text(encoding="utf-8"))
        if not allowed(path.relative_to(ROOT).as_posix(), text)
    }
    assert found == {}, "use [0-9] or [A-Za-z0-9_], or list the place in ALLOWED with the reason"
    assert len(SOURCES) > 100


@pytest.mark.parametrize("name", ALLOWED)
def test_every_listed_place_exists(name):
    there = [text for _, text in findings((ROOT / name).read_text(encoding="utf-8"))]
    unused = [part for part in ALLOWED[name] if not any(part in text for text in there)]
    assert unused == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x.isdigit()", ["isdigit"]),
        (r're.compile(r"\d+")', [r"\d+"]),
        (r're.compile("\\w")', [r"\w"]),
        (r're.compile(rf"{a}[^\W]")', [r"[^\W]"]),
        (r're.sub(r"\W", "", x, flags=re.ASCII)', []),
        (r'x = r"\dfrac{1}{2}", "\\\\d", r"[0-9]"', []),
        ('"""A docstring about \\\\d."""', []),
    ],
)
def test_scan_sees_predicates_and_classes(source, found):
    assert [text for _, text in findings(source)] == found
