"""Sets of real numbers that answers write as intervals, inequalities, unions, conditions or elements."""

import sympy
from sympy import Expr, Set, Symbol

from stages.rewards.answers import forms
from stages.rewards.answers.equality import equal
from stages.rewards.answers.formula import Unreadable, read_formula

_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}
INEQUALITIES = frozenset(_FLIPPED)
_NAMED = {"R": sympy.S.Reals, "Z": sympy.S.Integers, "N": sympy.S.Naturals, "Q": sympy.S.Rationals, "C": sympy.S.Complexes}


class NoSet(Exception):
    """The form is no set that can be compared as one."""


def states_set(form: forms.Form) -> bool:
    """Whether a form can only be a set of reals (pairs, which may be points, excluded)."""
    if isinstance(form, forms.Relation):
        return bool(form.signs) and all(sign in INEQUALITIES for sign in form.signs)
    if isinstance(form, forms.Several):
        return form.joined != "dots" and all(isinstance(item, forms.Relation) and states_set(item) for item in form.items)
    if isinstance(form, forms.Operation):
        return True
    return isinstance(form, forms.Interval | forms.Builder | forms.NamedSet)


def same_set(a: forms.Form, b: forms.Form) -> bool:
    r"""Whether two forms write the same set; False where one of them cannot be read as a set.

    Inequalities in different variables are different: `x > 3` is not `y > 3`. An interval has no variable and equals both.

    >>> above = forms.Relation((forms.Formula("x"), forms.Formula("3")), (">",))
    >>> half_line = forms.Formula("3"), forms.Formula(r"\infty")
    >>> same_set(above, forms.Sequence(half_line)), same_set(above, forms.Interval(*half_line, True, False))
    (True, False)
    """
    try:
        names = [variable_of(form) for form in (a, b)]
        if None not in names and names[0] != names[1]:
            return False
        return _equal_sets(to_set(a), to_set(b))
    except NoSet:
        return False


def variable_of(form: forms.Form) -> Symbol | None:
    """The variable of an inequality, or of several in the same one."""
    if isinstance(form, forms.Relation):
        symbols = set[Symbol]()
        for side in form.sides:
            symbols |= _expression(side).free_symbols
        return symbols.pop() if len(symbols) == 1 else None
    if isinstance(form, forms.Several):
        names = {variable_of(item) for item in form.items}
        return names.pop() if len(names) == 1 else None
    return None


def to_set(form: forms.Form) -> Set:
    """The set of reals that a form writes.

    Raises:
        NoSet: It writes none.

    """
    if isinstance(form, forms.NamedSet):
        return sympy.S.EmptySet if form.name == "empty" else _NAMED[form.name]
    if isinstance(form, forms.Interval):
        return _interval(_expression(form.left), _expression(form.right), form.left_closed, form.right_closed)
    if isinstance(form, forms.Sequence) and len(form.items) == 2:
        return _interval(_expression(form.items[0]), _expression(form.items[1]), form.square, form.square)
    if isinstance(form, forms.Braces):
        return sympy.FiniteSet(*(_expression(item) for item in form.items))
    if isinstance(form, forms.Builder):
        return to_set(form.condition)
    if isinstance(form, forms.Operation):
        parts = [to_set(part) for part in form.parts]
        if form.sign == "cap":
            return sympy.Intersection(*parts)
        return sympy.Union(*parts) if form.sign == "cup" else sympy.Complement(parts[0], sympy.Union(*parts[1:]))
    if isinstance(form, forms.Several):
        parts = [to_set(item) for item in form.items]
        if form.joined == "or":
            return sympy.Union(*parts)
        both = sympy.Intersection(*parts)
        # `x < 1, x > 3` lists cases; `x > 1, x < 3` conditions.
        return sympy.Union(*parts) if form.joined == "," and both == sympy.S.EmptySet else both
    if isinstance(form, forms.Relation):
        return _solutions(form)
    if isinstance(form, forms.Formula):
        return sympy.FiniteSet(_expression(form))
    raise NoSet


def _expression(form: forms.Form) -> Expr:
    if not isinstance(form, forms.Formula):
        raise NoSet
    try:
        return read_formula(form.text)
    except Unreadable as error:
        raise NoSet from error


def _interval(left: Expr, right: Expr, left_closed: bool, right_closed: bool) -> Set:
    if left.free_symbols or right.free_symbols or not (left.is_extended_real and right.is_extended_real):
        raise NoSet
    if (
        (left - right).is_positive
        if left not in (sympy.oo, -sympy.oo) or right not in (sympy.oo, -sympy.oo)
        else left == sympy.oo
    ):
        raise NoSet
    return sympy.Interval(left, right, not left_closed, not right_closed)


def _solutions(relation: forms.Relation) -> Set:
    """The reals that solve a chain of inequalities in one variable."""
    sides = [_expression(side) for side in relation.sides]
    if len(sides) == 2 and relation.signs == ("in",):
        return to_set(relation.sides[1])
    symbols = set().union(*(side.free_symbols for side in sides))
    if len(symbols) != 1 or not set(relation.signs) <= INEQUALITIES:
        raise NoSet
    (symbol,) = symbols
    parts = [_solved(*triple, symbol) for triple in zip(sides, relation.signs, sides[1:], strict=False)]
    return sympy.Intersection(*parts)


def _solved(left: Expr, sign: str, right: Expr, symbol: Symbol) -> Set:
    if right == symbol and not left.free_symbols:
        left, sign, right = right, _FLIPPED[sign], left
    if left == symbol and not right.free_symbols:
        if not right.is_extended_real:
            raise NoSet
        return {
            "<": lambda: sympy.Interval.open(-sympy.oo, right),
            "<=": lambda: sympy.Interval(-sympy.oo, right),
            ">": lambda: sympy.Interval.open(right, sympy.oo),
            ">=": lambda: sympy.Interval(right, sympy.oo),
            "!=": lambda: sympy.Complement(sympy.S.Reals, sympy.FiniteSet(right)),
        }[sign]()
    if sign == "!=":
        raise NoSet
    real = sympy.Symbol("x", real=True)
    kind = {"<": sympy.StrictLessThan, "<=": sympy.LessThan, ">": sympy.StrictGreaterThan, ">=": sympy.GreaterThan}[sign]
    condition = kind(left.xreplace({symbol: real}), right.xreplace({symbol: real}))
    if condition in (sympy.true, sympy.false):
        return sympy.S.Reals if condition == sympy.true else sympy.S.EmptySet
    try:
        return sympy.solve_univariate_inequality(condition, real, relational=False)
    except (NotImplementedError, ValueError, TypeError) as error:
        raise NoSet from error


def _equal_sets(a: Set, b: Set) -> bool:
    if a == b:
        return True
    pieces = [_pieces(part) for part in (a, b)]
    if None in pieces:
        return False
    left, right = pieces
    assert left is not None and right is not None
    return len(left) == len(right) and all(
        p[2:] == q[2:] and equal(p[0], q[0]) and equal(p[1], q[1]) for p, q in zip(left, right, strict=True)
    )


def _pieces(part: Set) -> list[tuple[Expr, Expr, bool, bool]] | None:
    """The intervals and points of a set by their place: ends, and whether they are open."""
    found: list[tuple[Expr, Expr, bool, bool]] = []
    for piece in part.args if isinstance(part, sympy.Union) else (part,):
        if isinstance(piece, sympy.Interval):
            found.append((piece.start, piece.end, bool(piece.left_open), bool(piece.right_open)))
        elif isinstance(piece, sympy.FiniteSet):
            found.extend((point, point, False, False) for point in piece.args)
        else:
            return None
    return sorted(found, key=lambda p: (float(p[0]), float(p[1]))) if all(p[0].is_extended_real for p in found) else None
