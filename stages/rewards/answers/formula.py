r"""Read one formula, in LaTeX or as typed, into a sympy expression with exact numbers.

A recursive-descent reader: decimals are rationals, implicit products and divisions go from left to right, powers from right to
left. It reads what final answers are made of; sums, integrals, limits and products over an index raise `Uncommon` and are left
to math-verify. Runs in a worker process, because evaluating an expression can take any time.

>>> read_formula(r"1\frac{1}{2}"), read_formula("2^{-3}"), read_formula("0.1\\overline{6}"), read_formula("2x(x+1)")
(3/2, 1/8, 1/6, 2*x*(x + 1))
"""

import re

import sympy
from sympy import Expr, Integer, Rational, Symbol

from stages.rewards.answers.formula_names import FUNCTIONS, GREEK, INVERSES, LOGARITHMS, NAMED, SEVERAL, UNCOMMON
from stages.rewards.answers.text import closing

_NUMBER = re.compile(
    r"(?:(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}(?![0-9])|[0-9]+)(?P<decimals>\.[0-9]*(?!\.))?|(?P<bare>\.[0-9]+))"
    r"(?:\\(?:overline|bar|dot)\{(?P<period>[0-9]+)\}|(?P<dots>\s*\\ldots))?"
    r"(?:[eE](?P<exponent>[+-]?[0-9]{1,4})(?![0-9A-Za-z^{(.]))?"
)
_MIXED = re.compile(
    r"(?P<whole>[0-9]+)(?:\s*\\frac\s*\{\s*(?P<top>[0-9]+)\s*\}\s*\{\s*(?P<below>[0-9]+)\s*\}"
    r"|\s*\\frac\s*(?P<t>[0-9])\s*(?P<b>[0-9])(?![0-9])|\s+(?P<first>[0-9]+)\s*/\s*(?P<second>[0-9]+)(?![0"
    r"-9]))"
)
_WORD = re.compile(r"[A-Za-z]+")
_COMMAND = re.compile(r"\\[A-Za-z]+|\\.")
_DEGREE = re.compile(r"\^?\s*\\circ(?![A-Za-z])")
_BLANK = re.compile(r"\s*")
_ADDENDS = re.compile(r"[+-]")
_PRODUCT = re.compile(r"\*(?!\*)|\\(?:cdot|times|ast|bullet)(?![A-Za-z])|(?<=[0-9])\s*x(?=\s*10\s*\^)")
_QUOTIENT = re.compile(r"/|\\div(?![A-Za-z])|:(?=\s*[0-9])(?!.)")
_SUBSCRIPT = re.compile(r"\s*_\s*(?:\{([^{}]*)\}|([A-Za-z0-9]))")
_PRIMES = re.compile(r"'+|\^\s*\{?\s*(?:\\prime\s*)+\}?")

_CLOSERS = {"(": ")", "[": "]", "{": "}"}
LARGEST_FACTORIAL = 2000


class Unreadable(Exception):
    """The text is no formula."""


class Uncommon(Unreadable):
    """The text has an operator that only a larger grammar reads."""


def read_formula(text: str) -> Expr:
    """Read a formula.

    Args:
        text: In the notation of `plain_text`, without relations and without lists.

    Raises:
        Unreadable: It is no formula; `Uncommon` when math-verify may still read it.

    """
    reader = _Reader(text)
    try:
        value = reader.sum()
    except (ArithmeticError, ValueError, TypeError, AttributeError) as error:  # sympy on an expression without a value
        raise Unreadable(str(error)) from error
    reader.blank()
    if reader.position < len(text):
        raise Unreadable(f"`{text[reader.position :]}` is left over")
    if value.has(sympy.nan, sympy.zoo):
        raise Unreadable("no value")
    return value


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.position = text, 0
        self.bars = 0
        """Absolute values that are open: a bar then closes."""

    # --- characters ---

    def blank(self) -> None:
        match = _BLANK.match(self.text, self.position)
        self.position = match.end() if match else self.position

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Match a pattern after blanks and pass it."""
        self.blank()
        match = pattern.match(self.text, self.position)
        if match is not None and match.end() > match.start():
            self.position = match.end()
            return match
        return None

    def peek(self) -> str:
        self.blank()
        return self.text[self.position : self.position + 1]

    def passed(self, literal: str) -> bool:
        self.blank()
        if self.text.startswith(literal, self.position):
            self.position += len(literal)
            return True
        return False

    def expect(self, literal: str) -> None:
        if not self.passed(literal):
            raise Unreadable(f"`{literal}` is missing")

    # --- grammar ---

    def sum(self) -> Expr:
        value = self.product()
        while (sign := self.take(_ADDENDS)) is not None:
            addend = self.product()
            value = value + addend if sign[0] == "+" else value - addend
        return value

    def product(self) -> Expr:
        value = self.signed()
        while True:
            if self.take(_PRODUCT) is not None:
                value = value * self.signed()
            elif self.take(_QUOTIENT) is not None:
                divisor = self.signed()
                if divisor == 0:
                    raise Unreadable("division by zero")
                value = value / divisor
            elif self.starts_factor():
                value = value * self.power()
            else:
                return value

    def starts_factor(self) -> bool:
        """Whether a further factor follows without a sign of multiplication: never a number, `2 3` is two numbers."""
        char = self.peek()
        if char == "|":
            return self.bars == 0
        if char == "\\":
            command = _COMMAND.match(self.text, self.position)
            name = command[0][1:] if command else ""
            return name not in ("rfloor", "rceil", "rangle", "mid", "%", "|", "}", "circ", "pm", "mp") and name[:1].isalpha()
        return char.isascii() and (char.isalpha() or char in "({[") if char else False

    def signed(self) -> Expr:
        self.blank()
        if self.passed("-"):
            return -self.signed()
        if self.passed("+"):
            return self.signed()
        return self.power()

    def power(self) -> Expr:
        base = self.postfix(self.atom())
        if self.passed("**") or (self.peek() == "^" and self.passed("^")):
            exponent = self.exponent()
            base = self.postfix(self.raised(base, exponent))
        return base

    def raised(self, base: Expr, exponent: Expr) -> Expr:
        if base == sympy.E:
            return sympy.exp(exponent)
        if base.is_Rational and base < 0 and exponent.is_Rational and exponent.q % 2 == 1 and exponent.q > 1:
            # School's convention: (-8)^{1/3} = -2.
            return (-1) ** (exponent.p % 2) * (-base) ** exponent
        if base == 0 and exponent.is_number and not exponent.is_positive:
            raise Unreadable("no power of zero")
        return base**exponent

    def exponent(self) -> Expr:
        if self.peek() in "{(":
            value = self.group()
        elif self.passed("-"):
            return -self.exponent()
        elif self.passed("+"):
            return self.exponent()
        else:
            value = self.postfix(self.atom())
        if self.passed("**") or (self.peek() == "^" and self.passed("^")):
            value = self.raised(value, self.exponent())
        return value

    def postfix(self, value: Expr) -> Expr:
        while True:
            if self.take(_DEGREE) is not None:
                value = value * sympy.pi / 180
            elif self.peek() == "!" and self.passed("!"):
                if value.is_number and not (value.is_Integer and 0 <= value <= LARGEST_FACTORIAL):
                    raise Unreadable("no factorial")
                value = sympy.factorial2(value) if self.passed("!") else sympy.factorial(value)
            elif self.passed(r"\%") or self.passed("%"):
                value = value / 100
            else:
                return value

    def group(self) -> Expr:
        """A bracket with one formula inside."""
        left = self.peek()
        self.expect(left)
        bars, self.bars = self.bars, 0
        value = self.sum()
        self.bars = bars
        self.expect(_CLOSERS[left])
        return value

    def argument(self) -> Expr:
        r"""What a command is applied to: a group, or one digit or letter as in `\frac12`."""
        char = self.peek()
        if char in "({":
            return self.group()
        if char.isascii() and char.isalnum():
            self.position += 1
            return Integer(char) if char.isdigit() else self.symbol(char)
        return self.atom()

    def atom(self) -> Expr:
        char = self.peek()
        if not char:
            raise Unreadable("something is missing")
        if char in "({[":
            return self.group()
        if char == "|":
            self.position += 1
            self.bars += 1
            value = self.sum()
            self.bars -= 1
            self.expect("|")
            return sympy.Abs(value)
        if char == "\\":
            return self.command()
        if char == "." or (char.isascii() and char.isdigit()):
            return self.number()
        if char.isascii() and char.isalpha():
            return self.word()
        raise Unreadable(f"`{char}`")

    def number(self) -> Expr:
        mixed = _MIXED.match(self.text, self.position)
        if mixed is not None:
            top, below = int(mixed["top"] or mixed["t"] or mixed["first"]), int(mixed["below"] or mixed["b"] or mixed["second"])
            if below and (top < below or mixed["first"]):
                self.position = mixed.end()
                return Integer(int(mixed["whole"])) + Rational(top, below)
        match = self.take(_NUMBER)
        if match is None:
            raise Unreadable("no number")
        whole = (match["whole"] or "0").replace(",", "")
        decimals = (match["decimals"] or match["bare"] or ".")[1:]
        value = Rational(int(whole + decimals), 10 ** len(decimals))
        period = match["period"]
        if match["dots"] and (repeated := re.search(r"([0-9]+?)\1{2,}$", decimals)) is not None:
            period = repeated[1]
        elif match["dots"]:
            raise Unreadable("a number that goes on")
        if period:
            value += Rational(int(period), (10 ** len(period) - 1) * 10 ** len(decimals))
        return value * Integer(10) ** int(match["exponent"] or 0)

    def word(self) -> Expr:
        """Letters: the name of a function or constant, else the first of them as a symbol."""
        match = _WORD.match(self.text, self.position)
        letters = match[0] if match else ""
        name = next((letters[:n] for n in range(len(letters), 1, -1) if letters[:n] in NAMED), None)
        if name is not None and (name == letters or name not in GREEK):
            self.position += len(name)
            return self.named(name)
        self.position += 1
        return self.symbol(letters[0])

    def command(self) -> Expr:
        match = _COMMAND.match(self.text, self.position)
        name = match[0][1:] if match else ""
        if name in UNCOMMON:
            raise Uncommon(name)
        self.position += len(name) + 1
        if name == "frac":
            return self.fraction()
        if name == "binom":
            above, below = self.argument(), self.argument()
            if (
                above.is_number
                and below.is_number
                and not (above.is_Integer and below.is_Integer and abs(above) <= LARGEST_FACTORIAL)
            ):
                raise Unreadable("no binomial")
            return sympy.binomial(above, below)
        if name in ("lfloor", "lceil"):
            value = self.sum()
            self.expect("\\r" + name[1:])
            return sympy.floor(value) if name == "lfloor" else sympy.ceiling(value)
        if name in ("overline", "bar", "hat", "tilde", "angle", "triangle", "widehat", "dot", "ddot"):
            return self.decorated(name)
        if name == "text":
            raise Unreadable("text")
        return self.named(name)

    def fraction(self) -> Expr:
        derivative = re.match(r"\s*\{\s*(?:d|\\partial|\\text\{d\})(?![A-Za-z])", self.text[self.position :])
        if derivative is not None:
            raise Uncommon("derivative")
        top = self.argument()
        below = self.argument()
        if below == 0:
            raise Unreadable("division by zero")
        return top / below

    def decorated(self, name: str) -> Expr:
        r"""A symbol that a decoration makes another one, such as `\overline{AB}`."""
        self.blank()
        if self.peek() == "{":
            end = closing(self.text, self.position)
            inner = self.text[self.position + 1 : end]
        else:
            match = re.compile(r"\\?[A-Za-z]+").match(self.text, self.position)
            inner, end = (match[0], match.end() - 1) if match else ("", -1)
        if end < 0 or not inner.strip():
            raise Unreadable(name)
        self.position = end + 1
        return Symbol(f"{'bar' if name == 'overline' else name}({''.join(inner.split())})")

    def named(self, name: str) -> Expr:
        if name == "pi":
            return sympy.pi
        if name in ("infty", "infinity"):
            return sympy.oo
        if name in ("sqrt", "cbrt"):
            return self.root(3 if name == "cbrt" else 2)
        if name == "abs":
            return sympy.Abs(self.group())
        if name in SEVERAL:
            return self.several(name)
        if name in LOGARITHMS:
            return self.logarithm()
        if name in FUNCTIONS:
            return self.applied(name)
        if name in GREEK:
            return self.symbol(name)
        raise Uncommon(name)

    def root(self, degree: int) -> Expr:
        index: Expr = Integer(degree)
        if self.peek() == "[":
            index = self.group()
        value = self.argument() if self.peek() != "" and self.peek() not in "0123456789" else self.number_of_root()
        if value.is_Rational and value < 0 and index.is_Integer and index % 2:
            return -sympy.root(-value, index)
        return sympy.root(value, index)

    def number_of_root(self) -> Expr:
        r"""The digits under a root without braces: `\sqrt17` and `sqrt 17` are the root of 17."""
        match = self.take(re.compile(r"[0-9]+(?:\.[0-9]+)?"))
        if match is None:
            raise Unreadable("nothing under the root")
        return Rational(match[0])

    def several(self, name: str) -> Expr:
        left = self.peek()
        if left not in _CLOSERS:
            if left != "\\" or not self.passed(r"\{"):
                raise Unreadable(name)
            right = r"\}"
        else:
            self.expect(left)
            right = _CLOSERS[left]
        values = [self.sum()]
        while self.passed(","):
            values.append(self.sum())
        self.expect(right)
        return SEVERAL[name](*values)

    def logarithm(self) -> Expr:
        base: Expr = Integer(10)
        if self.peek() == "_" and self.passed("_"):
            base = self.argument()
        exponent = self.exponent() if self.peek() == "^" and self.passed("^") else Integer(1)
        value = self.operand()
        if value == 0 or base in (0, 1):
            raise Unreadable("no logarithm")
        return sympy.log(value, base) ** exponent

    def applied(self, name: str) -> Expr:
        function = FUNCTIONS[name]
        exponent: Expr = Integer(1)
        if self.peek() == "^" and self.passed("^"):
            exponent = self.exponent()
            if exponent == -1 and name in INVERSES:
                function, exponent = INVERSES[name], Integer(1)
        value = function(self.operand())
        return value**exponent

    def operand(self) -> Expr:
        """The argument of a function: one bracket, or the factors up to a sign or the next function."""
        if self.peek() in ("(", "["):
            value = self.postfix(self.group())
            return self.raised(value, self.exponent()) if self.passed("^") else value
        if self.passed("-"):
            return -self.operand()
        value = self.power()
        while self.starts_factor() and not self.starts_function():
            value = value * self.power()
        return value

    def starts_function(self) -> bool:
        match = re.compile(r"\\?([A-Za-z]+)").match(self.text, self.position)
        return (match is not None and (match[1] in FUNCTIONS or match[1] in LOGARITHMS)) or self.peek() in ("(", "[")

    def symbol(self, name: str) -> Expr:
        """A variable with its subscript and primes; `e` and `i` alone are the constants, `f(x)` is a value of a function."""
        subscript = _SUBSCRIPT.match(self.text, self.position)
        if subscript is not None:
            self.position = subscript.end()
            name += "_" + "".join((subscript[1] or subscript[2] or "").replace(r"\text", "").split())
        primes = _PRIMES.match(self.text, self.position)
        if primes is not None:
            self.position = primes.end()
            name += "'" * (primes[0].count("'") + primes[0].count("prime"))
        if name in ("e", "i"):
            return sympy.E if name == "e" else sympy.I
        if name.rstrip("'") in ("f", "g", "h") and self.peek() == "(":
            self.expect("(")
            values = [self.sum()]
            while self.passed(","):
                values.append(self.sum())
            self.expect(")")
            return sympy.Function(name)(*values)
        return Symbol(name)
