r"""Which answers reasoning-gym's scorers may see: some of them have Python compute what an answer says (`eval`, sympy).

For those tasks an answer passes only as what it should be: a formula of numbers, names and functions of mathematics, or a
list; from these nothing can be reached. For all others, whose scorers compute nothing today, what could only be meant for
`eval` is refused, and prose passes. It is Python's own parser that reads an answer, as `eval` would: what no parser
understands nobody computes.

>>> refused("2*(3 + sqrt(16))", "countdown"), refused("open('f')", "countdown"), refused("door (open)", "countdown")
(False, True, True)
>>> refused("door (open)", "word_ladder"), refused("open the door", "word_ladder"), refused('["open", "S(x)"]', "word_ladder")
(False, False, False)
>>> refused("__import__('os')", "word_ladder"), refused("open(f)", "word_ladder")
(True, True)
"""

import ast
import builtins
import sys
import types

FORMULAS = frozenset({"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"})
"""Tasks whose scorers give the answer to sympy's `parse_expr`, which is `eval` with sympy's and Python's names."""
LISTS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
"""Tasks whose scorers give an answer that is not the expected text to `eval`."""
LONGEST = 100_000
"""Characters of an answer, far beyond any right one, from which it is refused unread: Python reads a megabyte in 3 s."""
_NAMES = """
abs Abs sqrt cbrt root exp log ln factorial Rational Integral erf erfc Ei Si Ci
sin cos tan sec csc cot asin acos atan asec acsc acot sinh cosh tanh sech csch coth asinh acosh atanh asech acsch acoth
"""
FUNCTIONS = frozenset(_NAMES.split())
"""What a formula may call. None of them reads text, and a formula holds none."""
_EVALUATORS = {"S", "autowrap", "init_session", "lambdify", "nsimplify", "parse_expr", "preview", "sympify", "ufuncify"}
_BUILTINS = frozenset(
    name
    for name, value in vars(builtins).items()
    if isinstance(value, types.BuiltinFunctionType) or (isinstance(value, type) and not issubclass(value, BaseException))
)
_CALLS = (_BUILTINS | _EVALUATORS | {"exit", "quit", "help"}) - FUNCTIONS
_PLAIN = (
    *(ast.Module, ast.Expression, ast.Expr, ast.Load, ast.Name, ast.Constant),
    *(ast.UnaryOp, ast.unaryop, ast.BinOp, ast.operator, ast.List, ast.Tuple, ast.Set, ast.Dict),
)
"""What an answer that is computed may consist of, beside calls of `FUNCTIONS` in formulas."""


def refused(answer: str, task: str) -> bool:
    """Whether the scorer of a task must not see an answer. A formula that Python cannot parse is refused as well."""
    if len(answer) > LONGEST:
        return True
    bad = _bad_in_formula if task in FORMULAS else _bad_in_list if task in LISTS else _bad_in_prose
    # As statements, with the white space at its ends off as sympy takes it off; and exactly as `eval` reads it: white space
    # counts after a backslash. The names in a tree are normalized (NFKC), as those that are looked up.
    for mode, text in (("exec", answer.strip()), ("eval", answer.lstrip(" \t"))):
        try:
            tree = ast.parse(text, mode=mode)
        except (SyntaxError, ValueError):
            if mode == "exec" and task in FORMULAS:
                return True
            continue
        except (MemoryError, RecursionError):  # nested so deeply that Python may see it otherwise another time
            return True
        if any(_hidden(node) or bad(node) for node in ast.walk(tree)):
            return True
    return False


def _hidden(node: ast.AST) -> bool:
    """Whether it names what Python keeps to itself: `__class__`. A blank (`____`) is none."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return "__" in name and name.strip("_") != ""


def _bad_in_formula(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return bool(node.keywords) or not (isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS)
    if isinstance(node, ast.Constant):  # sympy evaluates a text that it meets in place of a number
        return not isinstance(node.value, int | float | complex)
    return not isinstance(node, _PLAIN)


def _bad_in_list(node: ast.AST) -> bool:
    return not isinstance(node, _PLAIN)


def _bad_in_prose(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return _bad_call(node)
    if isinstance(node, ast.Import):  # `import taxes` are two words
        return any(alias.name.partition(".")[0] in sys.stdlib_module_names for alias in node.names)
    return isinstance(node, ast.Lambda | ast.JoinedStr | ast.ImportFrom)


def _bad_call(call: ast.Call) -> bool:
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    if any(isinstance(part, ast.Constant) and isinstance(part.value, str | bytes) for arg in given for part in ast.walk(arg)):
        return True
    if isinstance(call.func, ast.Name):
        return call.func.id in _CALLS
    return not isinstance(call.func, ast.BinOp | ast.Constant | ast.Call)  # `(x + 1)(x - 1)` is mathematics, `P(A) (B)` prose
