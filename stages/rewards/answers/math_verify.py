r"""Whether an answer states what the reference states; runs in a worker process, without a limit of its own.

The two texts are written in one notation (text.py), their forms are read (form_reader.py), and the forms are
compared part by part; formulas by exact algebra (formula.py, equality.py), sets as sets (sets.py). What only a larger
grammar reads (sums, integrals, limits) is read by math-verify.

>>> judge(r"\frac{1}{2}", "0.5"), judge("5", "5 or 6"), judge("", "5")
('right', 'wrong', 'none')
"""

from stages.rewards.answers.comparison import same_text, states_same
from stages.rewards.answers.form_reader import read_form
from stages.rewards.answers.text import plain_text

_WARMING = (
    r"\frac{1}{2}",
    r"\sqrt{2}+x^{2}",
    "(1,2]",
    r"\{1,2\}",
    r"\text{east}",
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
    "x=5",
    r"\sum_{k=1}^{3} k",
    r"\sin x",
    "x>3",
)


def warm() -> None:
    """Use the reader and sympy once: their tables are made as they go, which costs the first answers seconds."""
    for text in _WARMING:
        judge(text, text + "+1")


def judge(reference: str, answer: str) -> str:
    """`right`, `wrong`, or `none` when the reference is empty."""
    wanted, stated = plain_text(reference), plain_text(answer)
    if not wanted:
        return "none"
    if not stated:
        return "wrong"
    if same_text(wanted, stated):
        return "right"
    return "right" if states_same(read_form(wanted), read_form(stated)) else "wrong"
