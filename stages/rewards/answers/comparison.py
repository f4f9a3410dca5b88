"""Compare two final answers by their forms: the reference first, the answer second."""

import re
from collections.abc import Callable, Sequence
from types import UnionType

import sympy
from sympy import Symbol
from sympy.core.function import AppliedUndef

from stages.rewards.answers import forms
from stages.rewards.answers.amount_comparison import (
    based_and_plain,
    clock_and_other,
    ratio_and_quotient,
    same_amount,
    same_based,
    same_choice,
    same_clocks,
    same_quantities,
    same_ratios,
    same_words,
)
from stages.rewards.answers.equality import proportional
from stages.rewards.answers.forms import Form
from stages.rewards.answers.formula_values import same_formula, value_of
from stages.rewards.answers.sets import INEQUALITIES, same_set, states_set
from stages.rewards.answers.words import BARE_TEXT

_NAME = re.compile(
    r"[A-Za-z]+'*(?:_(?:\{[^{}]*\}|[A-Za-z0-9]))?(?:\^\{-1\})?\([A-Za-z][A-Za-z0-9,;=<>|\\{}_ +-]*\)"
    r"|[A-Z][a-z]*[\[(][^\[\]()]*[\])]"
    r"|m?\s*\\(?:angle|triangle|overline)\s*\{?[A-Za-z]+\}?"
)
"""Names beside variables: `P(X=2)`, `a(n)`, `f^{-1}(x)`, `m\\angle A`."""
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
MOST_ITEMS = 64
"""Items of a list that are compared with each other in any order."""


def same_text(a: str, b: str) -> bool:
    """Whether two texts in plain notation differ in blanks alone, where blanks do not part numbers."""
    return _squeezed(a) == _squeezed(b)


def _squeezed(text: str) -> str:
    text = " ".join(BARE_TEXT.sub(r"\1", text).split()) if r"\text" in text else text
    return re.sub(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])|(?<=[0-9])\s+(?=[A-Za-z])", "", text)


def states_same(a: Form, b: Form) -> bool:
    """Whether the answer `b` states what the reference `a` states.

    >>> items = forms.Formula("1"), forms.Formula("2")
    >>> states_same(forms.Sequence(items), forms.Sequence(items)), states_same(forms.Sequence(items), forms.Braces(items))
    (True, False)
    """
    a, b = _single(a), _single(b)
    for left, right, compare in _RULES:
        if isinstance(a, left) and isinstance(b, right):
            verdict = compare(a, b)
            if verdict is not None:
                return verdict
    return False


def _single(form: Form) -> Form:
    """The one item of a list of one."""
    while isinstance(form, forms.Several) and len(form.items) == 1:
        form = form.items[0]
    return form


# --- lists, tuples, matrices ---


def _lists(a: Form, b: Form) -> bool:
    assert isinstance(a, forms.Several) and isinstance(b, forms.Several)
    if "dots" in (a.joined, b.joined):
        return a.joined == b.joined and _in_order(a.items, b.items)
    if states_set(a) and states_set(b) and same_set(a, b):
        return True
    return _matched(_values(a.items), _values(b.items))


def _values(items: Sequence[Form]) -> Sequence[Form]:
    """The values of a list in which every item says `name = value` for the same name."""
    if all(isinstance(i, forms.Relation) and i.signs == ("=",) and isinstance(i.sides[0], forms.Formula) for i in items):
        names = {i.sides[0] for i in items if isinstance(i, forms.Relation)}
        if len(names) == 1:
            return [i.sides[1] for i in items if isinstance(i, forms.Relation)]
    return items


def _matched(a: Sequence[Form], b: Sequence[Form]) -> bool:
    """Whether the items are the same in some order, each as often."""
    if len(a) != len(b) or len(a) > MOST_ITEMS:
        return False
    left = list(b)
    for item in a:
        match = next((n for n, other in enumerate(left) if states_same(item, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _in_order(a: Sequence[Form], b: Sequence[Form]) -> bool:
    return len(a) == len(b) and all(
        (p == q) if forms.Formula(r"\ldots") in (p, q) else states_same(p, q) for p, q in zip(a, b, strict=True)
    )


def _as_sets(a: Form, b: Form) -> bool:
    """Sets by their elements; a list of answers or one answer may stand for the set of them."""
    items = [form.items if isinstance(form, forms.Braces | forms.Several) else (form,) for form in (a, b)]
    if forms.Formula(r"\ldots") in (*items[0], *items[1]):
        return _in_order(*items)
    if max(map(len, items)) > MOST_ITEMS:
        return False
    first, second = _values(items[0]), _values(items[1])
    return all(any(states_same(p, q) for q in second) for p in first) and all(
        any(states_same(p, q) for p in first) for q in second
    )


def _tuples(a: Form, b: Form) -> bool:
    assert isinstance(a, forms.Sequence) and isinstance(b, forms.Sequence)
    if a.square != b.square and len(a.items) == 2:  # an interval and a point
        return False
    return _in_order(a.items, b.items)


def _tuple_and_list(a: Form, b: Form) -> bool | None:
    """A tuple beside a list without brackets: the same in the same order."""
    pair, listed = (a, b) if isinstance(a, forms.Sequence) else (b, a)
    assert isinstance(pair, forms.Sequence) and isinstance(listed, forms.Several)
    if states_set(listed):
        return same_set(pair, listed)
    items = listed.items
    if all(isinstance(i, forms.Relation) and i.signs == ("=",) and _is_name(i.sides[0]) for i in items):
        items = tuple(i.sides[1] for i in items if isinstance(i, forms.Relation))
    return _in_order(pair.items, items) if isinstance(a, forms.Sequence) else _in_order(items, pair.items)


def _matrices(a: Form, b: Form) -> bool:
    rows = [form.rows if isinstance(form, forms.Matrix) else _column(form) for form in (a, b)]
    if isinstance(a, forms.Sequence) or isinstance(b, forms.Sequence):
        # A vector may be written as a tuple, a row or a column.
        rows = [tuple((cell,) for row in r for cell in row) if len(r) == 1 else r for r in rows]
    return len(rows[0]) == len(rows[1]) and all(_in_order(p, q) for p, q in zip(*rows, strict=True))


def _column(form: Form) -> tuple[tuple[Form, ...], ...]:
    assert isinstance(form, forms.Sequence)
    return tuple((item,) for item in form.items)


# --- relations ---


def _relations(a: Form, b: Form) -> bool:
    assert isinstance(a, forms.Relation) and isinstance(b, forms.Relation)
    if (a.signs, b.signs) == (("in",), ("in",)):
        return states_same(a.sides[0], b.sides[0]) and states_same(a.sides[1], b.sides[1])
    if set(a.signs) == set(b.signs) == {"="}:
        return _equations(a.sides, b.sides)
    single = len(a.signs) == len(b.signs) == 1
    if single and a.signs[0] in INEQUALITIES and b.signs[0] in INEQUALITIES and _same_inequality(a, b):
        return True
    if {"=", "in"} & {*a.signs, *b.signs}:
        plain, other = (a, b) if "=" in a.signs and len(a.signs) == 1 else (b, a)
        named = other.signs == ("in",) and plain.signs == ("=",) and states_same(plain.sides[0], other.sides[0])
        return named and states_same(*((plain.sides[1], other.sides[1]) if plain is a else (other.sides[1], plain.sides[1])))
    return same_set(a, b)


def _equations(a: tuple[Form, ...], b: tuple[Form, ...]) -> bool:
    """Chains of equations: the same name with the same value, the same sides, or equations with the same solutions."""
    for left, right in ((a, b), (a, b[::-1])):
        if _is_name(left[0]) and _is_name(right[0]) and _same_name(left[0], right[0]):
            return all(states_same(left[-1], side) for side in right[1:])
    if len(a) != 2 or len(b) != 2:
        return len(a) == len(b) and _in_order(a, b)
    if _in_order(a, b) or _in_order(a, b[::-1]):
        return True
    values = [value_of(side) for side in (*a, *b)]
    if None in values:
        return False
    left, right = values[0] - values[1], values[2] - values[3]  # type: ignore[operator]
    if left.free_symbols != right.free_symbols or not left.free_symbols:
        return False
    return proportional(left, right) is not None


def _same_inequality(a: forms.Relation, b: forms.Relation) -> bool:
    values = [value_of(side) for side in (*a.sides, *b.sides)]
    if None in values:
        return False
    ratio = proportional(values[0] - values[1], values[2] - values[3])  # type: ignore[operator]
    if ratio is None or not ratio.is_extended_real:
        return False
    sign = b.signs[0] if ratio.is_positive or b.signs[0] == "!=" else _FLIPPED[b.signs[0]]
    return a.signs[0] == sign


def _relation_and_list(a: Form, b: Form) -> bool | None:
    r"""`x \in \{1,2\}` or `S = \{1,2\}` beside a list; an inequality beside several."""
    relation, listed = (a, b) if isinstance(a, forms.Relation) else (b, a)
    assert isinstance(relation, forms.Relation) and isinstance(listed, forms.Several)
    if states_set(relation) or states_set(listed):
        return same_set(a, b)
    if (
        len(relation.sides) != 2
        or not _is_name(relation.sides[0])
        or not isinstance(relation.sides[1], forms.Braces | forms.Several)
    ):
        return False
    names = {item.sides[0] for item in listed.items if isinstance(item, forms.Relation)}
    if names and names != {relation.sides[0]}:
        return False
    pair = (relation.sides[1], listed) if relation is a else (listed, relation.sides[1])
    return states_same(*pair)


def _named_value(a: Form, b: Form) -> bool | None:
    """The reference gives a name to its value, the answer is a value alone."""
    assert isinstance(a, forms.Relation)
    if a.signs == ("in",):
        return states_same(a.sides[1], b)
    if set(a.signs) != {"="}:
        return same_set(a, b)
    if _is_name(a.sides[0]):
        return states_same(a.sides[-1], b)
    return _is_name(a.sides[-1]) and len(a.sides) == 2 and states_same(a.sides[0], b)


def _stated_value(a: Form, b: Form) -> bool | None:
    """The answer is a chain of equations: each side after the name is the reference, `4 = 5` is not 5."""
    assert isinstance(b, forms.Relation)
    if b.signs == ("in",):
        return states_same(a, b.sides[1])
    if set(b.signs) != {"="}:
        return same_set(a, b)
    sides = list(b.sides)
    if _is_name(sides[0]) or _is_quantity_name(sides[0]):
        sides = sides[1:]
    elif _is_name(sides[-1]) and len(sides) == 2:
        sides = sides[:1]
    return all(states_same(a, side) for side in sides)


def _is_name(form: Form) -> bool:
    """Whether a side names a value: a variable, `f(x)`, `P(A)`, an angle or segment, words, a tuple of variables."""
    if isinstance(form, forms.Words):
        return True
    if isinstance(form, forms.Sequence):
        return all(_is_name(item) for item in form.items)
    if not isinstance(form, forms.Formula):
        return False
    return _NAME.fullmatch(form.text) is not None or isinstance(value_of(form), Symbol | AppliedUndef)


def _same_name(a: Form, b: Form) -> bool:
    return a == b or states_same(a, b)


def _is_quantity_name(form: Form) -> bool:
    """Whether a side is a quantity of several variables, such as `a+b`, `AB`, `x^2+y^2`, or an absolute value."""
    if not isinstance(form, forms.Formula):
        return False
    if re.fullmatch(r"[A-Za-z]{2,}'*", form.text):
        return True
    value = value_of(form)
    return value is not None and (len(value.free_symbols) > 1 or (isinstance(value, sympy.Abs) and bool(value.free_symbols)))


_ANY = object
_Kind = type | UnionType
_Compare = Callable[[Form, Form], bool | None]
_LISTED = forms.Several | forms.Braces
_RULES: tuple[tuple[_Kind, _Kind, _Compare], ...] = (
    (forms.Choice, _ANY, lambda a, b: same_choice(a, b, states_same)),
    (_ANY, forms.Choice, lambda a, b: same_choice(a, b, states_same)),
    (forms.Formula, forms.Formula, same_formula),
    (forms.Quantity, forms.Quantity, lambda a, b: same_quantities(a, b, states_same)),
    (forms.Quantity, _ANY, lambda a, b: same_amount(a, b, states_same)),
    (_ANY, forms.Quantity, lambda a, b: same_amount(a, b, states_same)),
    (forms.Clock, forms.Clock, same_clocks),
    (forms.Clock, _ANY, clock_and_other),
    (_ANY, forms.Clock, clock_and_other),
    (forms.Relation, forms.Relation, _relations),
    (forms.Relation, forms.Several, _relation_and_list),
    (forms.Several, forms.Relation, _relation_and_list),
    (forms.Relation, _ANY, _named_value),
    (_ANY, forms.Relation, _stated_value),
    (forms.Words, _ANY, same_words),
    (_ANY, forms.Words, same_words),
    (forms.Ratio, forms.Ratio, same_ratios),
    (forms.Ratio, forms.Formula, ratio_and_quotient),
    (forms.Formula, forms.Ratio, ratio_and_quotient),
    (forms.Based, forms.Based, same_based),
    (forms.Based, forms.Formula, based_and_plain),
    (forms.Formula, forms.Based, based_and_plain),
    (forms.Several, forms.Several, _lists),
    (forms.Sequence, forms.Sequence, _tuples),
    (forms.Sequence, forms.Several, _tuple_and_list),
    (forms.Several, forms.Sequence, _tuple_and_list),
    (forms.Matrix, forms.Matrix | forms.Sequence, _matrices),
    (forms.Sequence, forms.Matrix, _matrices),
    (forms.Braces, _LISTED | forms.Formula, _as_sets),
    (_LISTED | forms.Formula, forms.Braces, _as_sets),
    (_ANY, _ANY, lambda a, b: same_set(a, b) if states_set(a) or states_set(b) else None),
)
