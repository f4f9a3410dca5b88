"""What steers a run of GRPO: which checkpoint is kept, the learning rate."""

import pytest

from stages.engine.settings import Optimizer
from stages.rl.select import Selection
from stages.rl.settings import Collapse


def test_the_best_evaluation_is_kept_and_a_collapse_stops():
    selection, collapse = Selection(), Collapse(below=0.5, patience=2)
    assert selection.see(10, 0.6, collapse)
    assert selection.see(20, 0.6, collapse)  # a tie goes to the later
    assert not selection.see(30, 0.2, collapse)
    assert not selection.stop(collapse)
    assert not selection.see(40, 0.29, collapse)
    assert selection.stop(collapse)
    assert (selection.best_step, selection.best_reward) == (20, 0.6)
    assert Selection.restored(selection.state()) == selection
    assert Selection.restored(Selection().state()) == Selection()


def test_one_bad_evaluation_between_good_ones_does_not_stop():
    selection, collapse = Selection(), Collapse(below=0.5, patience=2)
    for step, reward in enumerate([0.6, 0.2, 0.5, 0.2]):
        selection.see(step + 1, reward, collapse)
    assert not selection.stop(collapse)


def test_learning_rate():
    cosine = Optimizer(lr=1.0, schedule="cosine", warmup_steps=4, final_share=0.1)
    assert [cosine.lr_at(s, 104) for s in (0, 1, 3, 4)] == [0.25, 0.5, 1.0, 1.0]
    assert cosine.lr_at(54, 104) == pytest.approx(0.55)  # halfway: the mean of 1 and 0.1
    assert cosine.lr_at(104, 104) == pytest.approx(0.1)
    assert Optimizer(lr=2.0).lr_at(50, 100) == 2.0
