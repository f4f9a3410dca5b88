r"""Answers that hang sympy among ordinary ones, and how fast both are judged: `python -m tests.rewards.hanging_answers`.

The ordinary ones want algebra and have known verdicts. The hanging ones are towers of powers, huge factorials, deep nesting;
and, of another kind, expressions whose size cannot be told from their text, which cost the verifier its limit.
"""

import argparse
import random
import time

LIMIT_S = 1.0
UNTOLD = [
    r"\sum_{k=1}^{%d00} \frac{1}{k+\sqrt{2}}",
    r"\exp(\exp(\exp(\exp(%d))))",
    r"\prod_{k=1}^{%d00} (k+\sqrt{2})",
    r"\cos(\exp(\exp(\exp(%d))))",
    r"\sum_{k=1}^{%d00} \sqrt{k}",
]

Pair = tuple[str, str]


def ordinary(count: int, seed: int = 0) -> tuple[list[Pair], list[str]]:
    """Different pairs of expressions and their verdicts, by arithmetic on whole numbers alone."""
    rng, found = random.Random(seed), dict[Pair, str]()
    while len(found) < count:
        a, b, k, right = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 9), rng.random() < 0.5
        off = 0 if right else 1
        # Both sides are different texts; `off` makes the value another one.
        reference, answer = [
            (rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{k * a + off}}}{{{k * b}}}"),
            (rf"{k}\sqrt{{{b}}}", rf"\sqrt{{{k * k * b + off}}}"),
            (f"{a}x+{b}", f"{b + off} + {a} x"),
            (f"x^2+{a + b}x+{a * b}", f"(x+{a})(x+{b + off})"),
            (f"({a}, {a + b}]", rf"\left({a},{a + b + off}\right]"),
            (rf"\{{{a}, {a + b}\}}", rf"\{{{a + b + off}, {a}\}}"),
            (rf"{a}\pi", rf"\pi \cdot {a + off}"),
        ][rng.randrange(7)]
        found[reference, answer] = "right" if right else "wrong"
    return list(found), list(found.values())


def hanging(count: int, seed: int = 0) -> list[Pair]:
    """Different answers that sympy would not come back from, or not for a long time."""
    rng, found = random.Random(seed), dict[Pair, None]()
    while len(found) < count:
        a, b, c, d = (rng.randint(7, 99) for _ in range(4))
        depth = rng.randint(60, 130)
        answer = [
            f"{a}^{{{b}^{{{c}^{d}}}}}",
            f"({a}^{{{b}00}})^{{10^{{{c}}}}}",
            f"{a}{b}{c}{d}!",
            f"(({a}!)!)!",
            rf"\binom{{{a}0000000}}{{{b}00000}}",
            "(" * depth + str(a) + ")" * depth,
            r"\sqrt{" * depth + f"{b}+x" + "}" * depth,
            r"\frac{1}{1+" * depth + str(c) + "}" * depth,
        ][rng.randrange(8)]
        found[rng.choice([r"\pi", "x+1", r"\sqrt{2}", str(a)]), answer] = None
    return list(found)


def untold(count: int) -> list[Pair]:
    """Different answers that look harmless and are not."""
    return [(r"\pi", UNTOLD[n % len(UNTOLD)] % (500 + n)) for n in range(count)]


def mixed(plain: int, huge: int, hidden: int, seed: int = 0) -> tuple[list[Pair], list[str]]:
    """All of them in one shuffled list, with what must come out."""
    pairs, verdicts = ordinary(plain, seed)
    bad = hanging(huge, seed) + untold(hidden)
    rows = [*zip(pairs, verdicts, strict=True), *((pair, "none") for pair in bad)]
    random.Random(seed).shuffle(rows)
    return [pair for pair, _ in rows], [verdict for _, verdict in rows]


def main() -> None:
    """Answers per second without and with hanging ones, in turns, and the ratio."""
    from stages.rewards.answers.math_pool import MathPool

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--hanging", type=int, default=200)
    parser.add_argument("--untold", type=int, default=0, help="how many of the hanging ones look harmless")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    pool = MathPool(LIMIT_S)
    pool.judge(ordinary(20, seed=99)[0])
    without = ordinary(options.count)
    among = mixed(options.count - options.hanging, options.hanging - options.untold, options.untold)
    for _ in range(options.turns):
        speeds = []
        for pairs, wanted in (without, among):
            began = time.monotonic()
            found = pool.judge(pairs)
            speeds.append(len(pairs) / (time.monotonic() - began))
            wrong = sum(a != b for a, b in zip(found, wanted, strict=True))
            print(f"{len(pairs)} answers, {speeds[-1]:.0f} a second, {wrong} with another verdict than known", flush=True)
        print(f"ratio {speeds[1] / speeds[0]:.2f}", flush=True)
    pool.end()


if __name__ == "__main__":
    main()
