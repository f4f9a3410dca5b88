"""Updates under DeepSpeed on a GPU: the equation's gradient in float64, every ZeRO stage the same, a resumed run the same bits.

One process: NCCL wants a GPU for each. The CPU's tests (tests/rl/test_zero.py) have two.
"""

import pytest
import torch

from stages.rollout.records import write_groups
from tests.conftest import tiny_llama
from tests.rl import test_zero as cpu

pytestmark = pytest.mark.gpu
ZERO = range(4)
GPU = {"device": "cuda"}
FIRST = {
    **{f"zero{z}": cpu.UPDATES[f"zero{z}"] | GPU | {"recorded": "unequal"} for z in ZERO},
    **{f"bfloat16-zero{z}": cpu.HALF[f"bfloat16-zero{z}"] | GPU | {"recorded": "unequal"} for z in ZERO},
    **{f"gradient-zero{z}": cpu.GRADIENTS[f"gradient-zero{z}"] | GPU | {"recorded": "equal"} for z in ZERO},
    "gradient-bfloat16": cpu.GRADIENTS["gradient-bfloat16"] | GPU | {"recorded": "equal"},
    **{f"repeated-zero{z}": cpu.REPEATED[f"repeated-zero{z}"] | GPU | {"recorded": "equal"} for z in ZERO},
}
AGAIN = {
    f"again-{name}": FIRST[name] | {"resume": f"saved/{name}"}
    for name in (*(f"zero{z}" for z in ZERO), *(f"bfloat16-zero{z}" for z in ZERO))
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("updates")
    for name, groups in cpu.RECORDED.items():
        write_groups(folder / name, groups)
    found = cpu.run(folder, 1, FIRST) | cpu.run(folder, 1, AGAIN)
    with pytest.MonkeyPatch.context() as patch:  # as a stage's process has it when it is to compute on the CPU
        patch.setenv("DS_ACCELERATOR", "cpu")
        return found | cpu.run(folder, 1, {"plain": cpu.PLAIN["plain"] | {"recorded": "unequal"}})


@pytest.mark.parametrize("zero", ZERO)
def test_the_gradient_is_the_equations(results, zero):
    expected = cpu.plain_gradient(cpu.RECORDED["equal"])
    for gradient in results[f"gradient-zero{zero}"]["gradients"]:
        assert torch.linalg.norm(gradient.double() - expected) / torch.linalg.norm(expected) <= 1e-5


def test_the_gradient_is_the_equations_but_for_rounding_in_bfloat16(results):
    expected = cpu.plain_gradient(cpu.RECORDED["equal"])
    for gradient in results["gradient-bfloat16"]["gradients"]:
        assert torch.linalg.norm(gradient.double() - expected) / torch.linalg.norm(expected) <= 0.02


@pytest.mark.parametrize("zero", ZERO)
def test_updates_are_those_of_the_cpu(results, zero):
    cpu.same_updates(results[f"zero{zero}"], {1: results}, f"zero{zero}")


@pytest.mark.parametrize("zero", ZERO)
def test_every_zero_stage_makes_the_same_updates_in_bfloat16(results, zero):
    start = torch.cat([p.detach().flatten() for p in tiny_llama().float().parameters()])
    found, other, exact = (results[name]["weights"].float() for name in (f"bfloat16-zero{zero}", "bfloat16-zero0", "plain"))
    moved = torch.linalg.norm(exact - start)
    assert torch.linalg.norm(found - other) / moved <= 1e-4
    assert torch.linalg.norm(found - exact) / moved <= 0.25


@pytest.mark.parametrize("zero", ZERO)
def test_gradients_of_bfloat16_weights_are_summed_in_float32(results, zero):
    once, often = results[f"repeated-zero{zero}"]["gradients"]
    assert torch.linalg.norm(often - once) / torch.linalg.norm(once) <= 1e-5


@pytest.mark.parametrize("name", AGAIN)
def test_a_checkpoint_goes_on_with_the_same_bits(results, name):
    assert torch.equal(results[name]["weights"], results[name.removeprefix("again-")]["weights"])
