"""The clock by hand."""

import pytest

from stages.runtime.clock import Clock


def test_spans_add_up_and_nothing_counts_twice():
    now = [0.0]
    clock = Clock(lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    passes(1)  # before the first lap: nobody's
    clock.lap()
    with clock.span("prepare"):
        passes(2)
        with clock.span("sample"):
            passes(3)
            with clock.span("sample"):
                passes(5)
        passes(7)
    passes(11)  # in no span
    with clock.span("eval", whole=True):
        passes(13)
        with clock.span("sample"):
            passes(17)
    assert clock.lap() == {"prepare": 20, "sample": 8, "eval": 30, "step": 58}
    with clock.span("wait"):
        passes(1)
        assert clock.lap() == {"prepare": 0, "wait": 1, "step": 1}  # in the middle of a span
        passes(2)
    assert clock.lap() == {"wait": 2, "prepare": 0, "step": 2}


def test_a_span_that_fails_ends():
    now = [0.0]
    clock = Clock(lambda: now[0])
    with pytest.raises(ValueError, match="no"), clock.span("sample"):
        now[0] += 1
        raise ValueError("no")
    now[0] += 2
    assert clock.lap() == {"prepare": 2, "sample": 1, "step": 3}
