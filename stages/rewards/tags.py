"""What stands inside the paper's tags. Strict, because what a reward reads is what a policy learns to fake."""

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)


def thinking(text: str) -> str | None:
    """The chain of thought: what stands in the one `<think> </think>` pair; None when there is none or more than one.

    >>> thinking("<think>4*3=5</think><answer>5</answer>")
    '4*3=5'
    """
    if text.count(THINK_OPEN) != 1 or text.count(THINK_CLOSE) != 1:
        return None
    start, end = text.index(THINK_OPEN) + len(THINK_OPEN), text.index(THINK_CLOSE)
    return text[start:end] if start <= end else None


def final_answer(text: str) -> str | None:
    """The answer: what stands in the one `<answer> </answer>` pair after the thinking; None when there is no such answer.

    Several answers, an answer inside the thinking or before it, thinking that was never closed, tags inside the answer
    and an empty answer all give None. An answer without any thinking is an answer: whether that is allowed, the format
    reward says.

    >>> final_answer("<think>4*3=5</think><answer> 5 </answer>")
    '5'
    """
    if text.count(ANSWER_OPEN) != 1 or text.count(ANSWER_CLOSE) != 1:
        return None
    before, _, rest = text.partition(ANSWER_OPEN)
    answer, closed, after = rest.partition(ANSWER_CLOSE)
    if not closed or any(tag in answer + after for tag in TAGS):
        return None
    if before.rfind(THINK_OPEN) > before.rfind(THINK_CLOSE):  # the thinking was still open
        return None
    return answer.strip() or None
