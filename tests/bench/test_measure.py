"""The bench's arithmetic: what it says of seconds and memory, and how many operations an update needs."""

import pytest
import torch

from tests.bench.evaluation import right
from tests.bench.material import reward_of
from tests.bench.measure import against, exponent, table
from tests.bench.report import metrics
from tests.bench.sides import SideFailed, Spec, once
from tests.bench.update import flops
from tests.conftest import tiny_llama


def turn(seconds, peak=1.0, **more):
    return {"seconds": seconds, "peak_mib": peak, **more}


def test_ratios_are_of_rounds():
    found = against([turn(1.0, 3.0), turn(4.0, 2.0), turn(3.0)], [turn(2.0), turn(4.0, 6.0), turn(4.0)])
    assert found["ratio"] == {"median": 0.75, "least": 0.5, "most": 1.0}
    assert found["memory_ratio"] == 0.5


def test_unequally_many_tokens_are_compared_per_token():
    assert against([turn(1.0, tokens=10)], [turn(4.0, tokens=20)])["ratios"] == [0.5]


def test_exponent():
    assert exponent([1, 4, 16], [3.0, 6.0, 12.0]) == pytest.approx(0.5)


def test_a_side_that_fails_is_named(tmp_path):
    with pytest.raises(SideFailed, match="KeyError: 'nothing'"):
        once(Spec("measure", "nothing"), tmp_path / "log")


def test_results_that_failed_are_shown():
    results = [{"name": "step", "failed": "out of memory"}, {"name": "growth", "found": {"exponent": 1.0, "exact": "true"}}]
    lines = list(table(results))
    assert "out of memory" in lines[1]
    assert metrics(results) == {"growth/exponent": 1.0}


def test_rewards_of_different_answers_differ():
    assert reward_of([5, 9]) != reward_of([9, 5])


@pytest.mark.parametrize(
    ("text", "answer", "expected"), [("It is 1,200.", "1200", True), ("7 or 8", "7", False), ("none", "7", False)]
)
def test_last_number(text, answer, expected):
    assert right(text, answer) is expected


def test_flops_are_those_that_torch_counts():
    """Of one text, whose products alone torch counts too; attention it counts without the causal mask."""
    from torch.utils.flop_counter import FlopCounterMode

    prompt, answer = [3, 4, 5, 6, 7], [8, 9, 10]
    model = tiny_llama()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.tensor([[*prompt, *answer[:-1]]]), logits_to_keep=len(answer))
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in {"aten.mm", "aten.addmm"})
    config = model.config
    seen = sum(range(1, len(prompt) + len(answer)))
    attention = 4 * config.num_hidden_layers * config.hidden_size * seen
    recorded = [{"prompt": prompt, "answers": [{"ids": answer}]}]
    assert flops(config.to_dict(), recorded) == 3 * (products + attention)


def test_flops_count_a_shared_prompt_once():
    config = tiny_llama().config.to_dict()
    prompt, answer = list(range(2, 12)), {"ids": [3, 4]}
    together = flops(config, [{"prompt": prompt, "answers": [answer, answer]}])
    apart = flops(config, [{"prompt": prompt, "answers": [answer]}] * 2)
    alone = flops(config, [{"prompt": prompt, "answers": [{"ids": []}]}])  # not a text: the arithmetic of a prompt alone
    assert together < apart
    assert alone < together
