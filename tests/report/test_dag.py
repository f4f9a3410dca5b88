"""The layout of the graph of stages."""

import re
from graphlib import CycleError

import pytest

from stages.contract.config import stage_inputs
from stages.recipe.resolve import load_recipe
from stages.report.dag import HEIGHT, STEP, WIDTH, layout
from tests.conftest import ROOT

QUICKSTART = {
    "base": [],
    "zero": ["base"],
    "data": ["zero"],
    "cold_start": ["base", "data"],
    "e.base": ["base"],
    "e.cold_start": ["cold_start"],
    "e": ["e.base", "e.cold_start"],
}


def recipe_needs(name: str) -> dict[str, list[str]]:
    recipe = load_recipe(ROOT / "configs" / name)
    return {stage: [source for source, _ in stage_inputs(config).values()] for stage, config in recipe.stages.items()}


def test_every_stage_is_below_what_it_needs() -> None:
    found = layout(QUICKSTART)
    rows = {name: round((top - 2) / STEP) for name, (_, top) in found.boxes.items()}
    assert rows == {"base": 0, "zero": 1, "data": 2, "cold_start": 3, "e.base": 1, "e.cold_start": 4, "e": 5}
    assert found.height == 5 * STEP + HEIGHT + 4
    assert len(found.arrows) == sum(len(sources) for sources in QUICKSTART.values())


@pytest.mark.parametrize("name", ["quickstart.yaml", "quickstart-full.yaml"])
def test_boxes_lie_apart_and_arrows_go_round_them(name: str) -> None:
    found = layout(recipe_needs(name))
    boxes = list(found.boxes.values())
    for x, y in boxes:
        assert 0 <= x <= found.width - WIDTH
        assert 0 <= y <= found.height - HEIGHT
        assert sum(abs(x - other) < WIDTH and y == level for other, level in boxes) == 1
    for arrow in found.arrows:
        # An arrow passes a layer on a vertical line, and no box of that layer is in its way.
        for start_x, start_y in re.findall(r"([\d.]+) ([\d.]+)V", arrow):
            assert all(not (x < float(start_x) < x + WIDTH) for x, y in boxes if abs(y - float(start_y)) < 1)
    assert found.width < 1600


def test_what_is_no_stage_is_left_out_and_circles_are_told() -> None:
    assert layout({}).boxes == {}
    found = layout({"a": ["gone", "gone"], "b": ["a", "a"]})
    assert len(found.arrows) == 1
    with pytest.raises(CycleError):
        layout({"a": ["b"], "b": ["a"]})
