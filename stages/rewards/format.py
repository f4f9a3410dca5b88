"""The format reward: thinking, then answer, each in its tags (DeepSeek-R1, section 2.2)."""

from stages.rewards.tags import ANSWER_CLOSE, ANSWER_OPEN, TAGS, THINK_CLOSE, THINK_OPEN


def well_formed(text: str, *, require_thinking: bool = True) -> bool:
    """Whether each tag stands exactly once, in order, with nothing outside the two pairs and something in the answer.

    `require_thinking`: empty thinking fails too. Whitespace is allowed before `<think>`, between the pairs, and at the end.

    >>> well_formed("<think>a</think> <answer>b</answer>"), well_formed("<think>a</think><answer>b</answer>!")
    (True, False)
    """
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    head, _, rest = text.partition(THINK_OPEN)
    thought, _, rest = rest.partition(THINK_CLOSE)
    between, _, rest = rest.partition(ANSWER_OPEN)
    answer, closed, tail = rest.partition(ANSWER_CLOSE)
    in_order = bool(closed) and not any(tag in part for tag in TAGS for part in (head, thought, between, answer, tail))
    outside_empty = not (head.strip() or between.strip() or tail.strip())
    return in_order and outside_empty and bool(answer.strip()) and (bool(thought.strip()) or not require_thinking)
