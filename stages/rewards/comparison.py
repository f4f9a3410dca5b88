"""Compare two final answers by their forms: the reference first, the answer second."""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

import sympy
from sympy import Expr, Rational, Symbol
from sympy.core.function import AppliedUndef

from stages.rewards import answer_forms as forms
from stages.rewards.answer_forms import Form
from stages.rewards.answer_words import BARE_TEXT, words_key
from stages.rewards.equality import equal, proportional
from stages.rewards.formula import Uncommon, Unreadable, read_formula
from stages.rewards.sets import INEQUALITIES, same_set, states_set
from stages.rewards.units import dimension_of, singular

_DECIMAL = re.compile(r"[+-]?\s*(?:[0-9][0-9,]*)?\.[0-9]+(?:[eE][+-]?[0-9]+|\s*\\(?:times|cdot)\s*10\s*\^.*)?")
_NAME = re.compile(
    r"[A-Za-z]+'*(?:_(?:\{[^{}]*\}|[A-Za-z0-9]))?(?:\^\{-1\})?\([A-Za-z][A-Za-z0-9,;=<>|\\{}_ +-]*\)|[A-Z][a-z]*[\[(][^\[\]()]*[\])]"
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
    """Whether the answer `b` states what the reference `a` states."""
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


# --- words and choices ---


def _words(a: Form, b: Form) -> bool:
    keys = [words_key(_written(form)) for form in (a, b)]
    return keys[0] == keys[1] != ""


def _written(form: Form) -> str:
    if isinstance(form, forms.Words | forms.Formula):
        return form.text if isinstance(form, forms.Words) or not re.search(r"[^A-Za-z\s]", form.text) else ""
    if isinstance(form, forms.Quantity) and isinstance(form.amount, forms.Formula):
        return f"{form.amount.text} {form.unit}"
    return ""


def _choice(a: Form, b: Form) -> bool | None:
    letters = [form.letter if isinstance(form, forms.Choice) else _letter(form) for form in (a, b)]
    contents = [form.content if isinstance(form, forms.Choice) else None for form in (a, b)]
    if letters[0] and letters[1]:
        same = letters[0] == letters[1]
        return same and (None in contents or states_same(contents[0], contents[1]))  # type: ignore[arg-type]
    for content, other in ((contents[0], b), (contents[1], a)):
        if content is not None:
            return states_same(content, other)
    return False


def _letter(form: Form) -> str:
    if isinstance(form, forms.Formula) and (match := re.fullmatch(r"\(?([A-Za-z])\)?", form.text)):
        return match[1].upper()
    return ""


# --- quantities, times, ratios, bases ---


def _quantities(a: Form, b: Form) -> bool | None:
    assert isinstance(a, forms.Quantity) and isinstance(b, forms.Quantity)
    if a.unit == b.unit:
        return states_same(a.amount, b.amount)
    if a.unit.startswith("deg") and b.unit.startswith("deg"):
        return "deg" in (a.unit, b.unit) and states_same(a.amount, b.amount)
    sizes = [dimension_of(form.unit) for form in (a, b)]
    if sizes[0] is not None and sizes[1] is not None:
        if sizes[0][0] != sizes[1][0]:
            return False
        return _same_value(a.amount, b.amount, sizes[0][1], sizes[1][1])
    if "%" in (a.unit, b.unit):
        return _same_words(a.unit.replace("%", ""), b.unit.replace("%", "")) and states_same(a.amount, b.amount)
    return _same_words(a.unit, b.unit) and states_same(a.amount, b.amount)


def _same_words(a: str, b: str) -> bool:
    """Whether one unit says what the other says and perhaps more: `hours` and `hours later`."""
    words = [
        {singular(word) for word in re.findall(r"[A-Za-z]+|[0-9]+", unit)} - {"per", "a", "an", "the", "of"} for unit in (a, b)
    ]
    return words[0] <= words[1] or words[1] <= words[0]


def _quantity(a: Form, b: Form) -> bool | None:
    """A quantity beside something without a unit."""
    if isinstance(a, forms.Quantity):
        amount, unit, other = a.amount, a.unit, b
    else:
        assert isinstance(b, forms.Quantity)
        amount, unit, other = b.amount, b.unit, a
    if isinstance(other, forms.Words):
        return _words(a, b)
    if isinstance(other, forms.Relation | forms.Several | forms.Braces):
        return None
    pair = (amount, other) if isinstance(a, forms.Quantity) else (other, amount)
    if states_same(*pair):
        return True
    if unit == "%":
        return _same_value(amount, other, Fraction(1, 100), Fraction(1))
    if unit == "deg":
        values = _value(amount), _value(other)
        radians = values[1] is not None and not values[1].is_Rational
        return radians and values[0] is not None and equal(values[0] * sympy.pi / 180, values[1])
    return False


def _same_value(a: Form, b: Form, a_size: Fraction, b_size: Fraction) -> bool:
    values = _value(a), _value(b)
    if values[0] is None or values[1] is None:
        return False
    left, right = (
        v * Rational(s.numerator, s.denominator) for v, s in zip(values, (a_size, b_size), strict=True) if v is not None
    )
    return equal(left, right, a_decimal=_is_decimal(a), b_decimal=_is_decimal(b))


def _clocks(a: Form, b: Form) -> bool:
    assert isinstance(a, forms.Clock) and isinstance(b, forms.Clock)
    if a.half and b.half:
        return _of_day(a) == _of_day(b)
    if a.half or b.half:  # 5 p.m. is 17:00, and 5:00 where nothing says which
        return a.parts == b.parts or _of_day(a) == _of_day(b)
    return a.parts == b.parts


def _of_day(clock: forms.Clock) -> tuple[int, ...]:
    hour = clock.parts[0] % 12 + 12 * (clock.half == "pm") if clock.half else clock.parts[0]
    return (hour, *clock.parts[1:])


def _clock(a: Form, b: Form) -> bool | None:
    clock, other = (a, b) if isinstance(a, forms.Clock) else (b, a)
    assert isinstance(clock, forms.Clock)
    if isinstance(other, forms.Ratio):
        values = [_value(part) for part in other.parts]
        return len(values) == len(clock.parts) and all(v == p for v, p in zip(values, clock.parts, strict=True))
    if isinstance(other, forms.Formula) and clock.half and not any(clock.parts[1:]):
        return _value(other) == clock.parts[0]
    return None if isinstance(other, forms.Relation | forms.Several) else False


def _ratios(a: Form, b: Form) -> bool:
    assert isinstance(a, forms.Ratio) and isinstance(b, forms.Ratio)
    values = [[_value(part) for part in form.parts] for form in (a, b)]
    if len(values[0]) != len(values[1]) or None in values[0] or None in values[1]:
        return False
    pairs = list(zip(values[0], values[1], strict=True))
    return all(p * values[1][0] == q * values[0][0] for p, q in pairs) and any(p != 0 for p, _ in pairs)  # type: ignore[operator]


def _ratio(a: Form, b: Form) -> bool:
    """A ratio of two beside their quotient."""
    ratio, other = (a, b) if isinstance(a, forms.Ratio) else (b, a)
    assert isinstance(ratio, forms.Ratio)
    values = [_value(part) for part in (*ratio.parts, other)]
    return len(values) == 3 and None not in values and values[1] != 0 and equal(values[0] / values[1], values[2])  # type: ignore[operator]


def _bases(a: Form, b: Form) -> bool:
    assert isinstance(a, forms.Based) and isinstance(b, forms.Based)
    return int(a.digits, a.base) == int(b.digits, b.base)


def _base(a: Form, b: Form) -> bool:
    """A number with its base beside one without: the same number, or the digits alone where the question says in which base."""
    based, other = (a, b) if isinstance(a, forms.Based) else (b, a)
    assert isinstance(based, forms.Based) and isinstance(other, forms.Formula)
    if other.text.strip().upper().lstrip("0") == based.digits:
        return True
    return bool(_value(other) == int(based.digits, based.base))


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
    if len(a.signs) == len(b.signs) == 1 and a.signs[0] in INEQUALITIES and b.signs[0] in INEQUALITIES:
        if _same_inequality(a, b):
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
    values = [_value(side) for side in (*a, *b)]
    if None in values:
        return False
    left, right = values[0] - values[1], values[2] - values[3]  # type: ignore[operator]
    if left.free_symbols != right.free_symbols or not left.free_symbols:
        return False
    return proportional(left, right) is not None


def _same_inequality(a: forms.Relation, b: forms.Relation) -> bool:
    values = [_value(side) for side in (*a.sides, *b.sides)]
    if None in values:
        return False
    ratio = proportional(values[0] - values[1], values[2] - values[3])  # type: ignore[operator]
    if ratio is None or not ratio.is_extended_real:
        return False
    sign = b.signs[0] if ratio.is_positive or b.signs[0] == "!=" else _FLIPPED[b.signs[0]]
    return a.signs[0] == sign


def _relation_and_list(a: Form, b: Form) -> bool | None:
    """`x \\in \\{1,2\\}` or `S = \\{1,2\\}` beside a list; an inequality beside several."""
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
    return _NAME.fullmatch(form.text) is not None or isinstance(_value(form), Symbol | AppliedUndef)


def _same_name(a: Form, b: Form) -> bool:
    return a == b or states_same(a, b)


def _is_quantity_name(form: Form) -> bool:
    """Whether a side is a quantity of several variables, such as `a+b`, `AB`, `x^2+y^2`, or an absolute value."""
    if not isinstance(form, forms.Formula):
        return False
    if re.fullmatch(r"[A-Za-z]{2,}'*", form.text):
        return True
    value = _value(form)
    return value is not None and (len(value.free_symbols) > 1 or (isinstance(value, sympy.Abs) and bool(value.free_symbols)))


# --- formulas ---


def _formulas(a: Form, b: Form) -> bool:
    assert isinstance(a, forms.Formula) and isinstance(b, forms.Formula)
    values = _value(a), _value(b)
    if values[0] is None or values[1] is None:
        return False
    return equal(values[0], values[1], a_decimal=_is_decimal(a), b_decimal=_is_decimal(b))


def _is_decimal(form: Form) -> bool:
    return isinstance(form, forms.Formula) and _DECIMAL.fullmatch(form.text) is not None


def _value(form: Form) -> Expr | None:
    """The value of a formula, or None when it has none."""
    if isinstance(form, forms.Quantity):
        return _value(form.amount)
    if not isinstance(form, forms.Formula):
        return None
    try:
        return read_formula(form.text)
    except Uncommon:
        return _read_by_math_verify(form.text)
    except Unreadable:
        return None


def _read_by_math_verify(text: str) -> Expr | None:
    from math_verify import parse

    parsed = parse(f"\\boxed{{{text}}}", parsing_timeout=None)
    if not parsed or not isinstance(parsed[0], Expr):
        return None
    value = parsed[0].doit()
    value = value.replace(lambda part: part.is_Float, lambda part: sympy.nsimplify(part, rational=True))
    value = value.xreplace({Symbol("i"): sympy.I})
    return None if value.has(sympy.nan, sympy.zoo) or not isinstance(value, Expr) else value


_ANY = object
_Compare = Callable[[Form, Form], bool | None]
_LISTED = forms.Several | forms.Braces
_RULES: tuple[tuple[type, type, _Compare], ...] = (
    (forms.Choice, _ANY, _choice),
    (_ANY, forms.Choice, _choice),
    (forms.Formula, forms.Formula, _formulas),
    (forms.Quantity, forms.Quantity, _quantities),
    (forms.Quantity, _ANY, _quantity),
    (_ANY, forms.Quantity, _quantity),
    (forms.Clock, forms.Clock, _clocks),
    (forms.Clock, _ANY, _clock),
    (_ANY, forms.Clock, _clock),
    (forms.Relation, forms.Relation, _relations),
    (forms.Relation, forms.Several, _relation_and_list),
    (forms.Several, forms.Relation, _relation_and_list),
    (forms.Relation, _ANY, _named_value),
    (_ANY, forms.Relation, _stated_value),
    (forms.Words, _ANY, _words),
    (_ANY, forms.Words, _words),
    (forms.Ratio, forms.Ratio, _ratios),
    (forms.Ratio, forms.Formula, _ratio),
    (forms.Formula, forms.Ratio, _ratio),
    (forms.Based, forms.Based, _bases),
    (forms.Based, forms.Formula, _base),
    (forms.Formula, forms.Based, _base),
    (forms.Several, forms.Several, _lists),
    (forms.Sequence, forms.Sequence, _tuples),
    (forms.Sequence, forms.Several, _tuple_and_list),
    (forms.Several, forms.Sequence, _tuple_and_list),
    (forms.Matrix, forms.Matrix | forms.Sequence, _matrices),  # type: ignore[arg-type]
    (forms.Sequence, forms.Matrix, _matrices),
    (forms.Braces, _LISTED | forms.Formula, _as_sets),  # type: ignore[arg-type]
    (_LISTED | forms.Formula, forms.Braces, _as_sets),  # type: ignore[arg-type]
    (_ANY, _ANY, lambda a, b: same_set(a, b) if states_set(a) or states_set(b) else None),
)
