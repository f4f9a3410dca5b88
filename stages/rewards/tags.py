"""What stands inside the paper's tags. Strict, because what a reward reads is what a policy learns to fake."""

import re
from typing import Literal

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
AnswerPlace = Literal["tags", "boxed"]
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def thinking(text: str) -> str | None:
    """The chain of thought: what stands in the one `<think> </think>` pair; None when there is none or more than one.

    >>> thinking("<think>4*3=5</think><answer>5</answer>")
    '4*3=5'
    """
    if text.count(THINK_OPEN) != 1 or text.count(THINK_CLOSE) != 1:
        return None
    start, end = text.index(THINK_OPEN) + len(THINK_OPEN), text.index(THINK_CLOSE)
    return text[start:end] if start <= end else None


def final_answer(text: str, place: AnswerPlace = "tags") -> str | None:
    r"""The answer: what stands in the one `<answer> </answer>` pair after the thinking; None when there is no such answer.

    Several answers, an answer inside the thinking or before it, thinking that was never closed, tags inside the answer
    and an empty answer all give None. An answer without any thinking is an answer: whether that is allowed, the format
    reward says. With `place="boxed"` it is what stands in the one box after the thinking.

    >>> final_answer("<think>4*3=5</think><answer> 5 </answer>")
    '5'
    >>> final_answer(r"so it is \boxed{\frac{1}{2}}.", "boxed")
    '\\frac{1}{2}'
    """
    if place == "boxed":
        return _boxed_answer(text)
    if text.count(ANSWER_OPEN) != 1 or text.count(ANSWER_CLOSE) != 1:
        return None
    before, _, rest = text.partition(ANSWER_OPEN)
    answer, closed, after = rest.partition(ANSWER_CLOSE)
    if not closed or any(tag in answer + after for tag in TAGS):
        return None
    if before.rfind(THINK_OPEN) > before.rfind(THINK_CLOSE):  # the thinking was still open
        return None
    return answer.strip() or None


def boxes(text: str) -> list[str]:
    r"""What stands in each outermost box of a text; a box that is never closed is none.

    >>> boxes(r"\boxed{1}, \boxed{\frac{2}{3}} and \boxed{4")
    ['1', '\\frac{2}{3}']
    """
    found, position = [], 0
    while (opening := _BOX.search(text, position)) is not None:
        start = position = opening.end()
        depth = 1
        while position < len(text) and depth:
            depth += (text[position] == "{") - (text[position] == "}")
            position += 1
        if not depth:
            found.append(text[start : position - 1].strip())
    return found


def _boxed_answer(text: str) -> str | None:
    """What all boxes after the thinking agree on; None without a box, with different ones, or while the thinking is open."""
    if text.rfind(THINK_OPEN) > text.rfind(THINK_CLOSE):
        return None
    answers = set(boxes(text.rpartition(THINK_CLOSE)[2]))
    return (answers.pop() or None) if len(answers) == 1 else None


def several_answers(text: str) -> bool:
    r"""Whether a text states more than one final answer: a second `<answer>`, or different boxes outside the thinking.

    >>> several_answers("<answer>1</answer><answer>2</answer>"), several_answers(r"\boxed{1} or \boxed{2}")
    (True, True)
    >>> several_answers(r"<think>\boxed{1}? no</think><answer>\boxed{2}</answer>")
    False
    """
    return text.count(ANSWER_OPEN) > 1 or len(set(boxes(text.rpartition(THINK_CLOSE)[2]))) > 1
