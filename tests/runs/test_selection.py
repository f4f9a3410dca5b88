"""`--from`, `--until`, `--fresh`."""

from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from flows.runs.selection import select
from stages.contract.config import StageConfig, StageInput
from stages.contract.errors import UserError
from stages.recipe.resolve import ResolvedRecipe, Tracking


class Step(StageConfig):
    """A stage that needs another one."""

    needs: Annotated[list[str], StageInput("model")] = Field(default=[])


@pytest.fixture
def recipe() -> ResolvedRecipe:
    needs = {"base": [], "zero": ["base"], "e.base": ["base"], "e.zero": ["zero"], "e": ["e.base", "e.zero"]}
    stages: dict[str, Any] = {name: Step(kind="x", needs=inputs) for name, inputs in needs.items()}
    sources = {"base": ["base"], "zero": ["zero"], "e": ["e.base", "e.zero", "e"]}
    return ResolvedRecipe("n", Path("runs"), Tracking(), stages, sources, {})


def test_everything(recipe: ResolvedRecipe) -> None:
    found = select(recipe)
    assert found.order == list(recipe.stages)
    assert found.finished == found.fresh == set()


def test_until_leaves_out_what_the_stage_does_not_need(recipe: ResolvedRecipe) -> None:
    assert select(recipe, until_stage="zero").order == ["base", "zero"]
    assert select(recipe, until_stage="e.base").order == ["base", "e.base"]


def test_from_demands_what_the_stage_needs(recipe: ResolvedRecipe) -> None:
    assert select(recipe, from_stage="zero").finished == {"base"}
    assert select(recipe, from_stage="e").finished == {"base", "zero"}
    assert select(recipe, from_stage="e.zero", until_stage="e").finished == {"base", "zero"}


def test_fresh_takes_expanded_stages_along(recipe: ResolvedRecipe) -> None:
    assert select(recipe, fresh=["e"]).fresh == {"e.base", "e.zero", "e"}
    assert select(recipe, until_stage="zero", fresh=["e", "zero"]).fresh == {"zero"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"from_stage": "zer"}, "did you mean `zero`"),
        ({"until_stage": "zer"}, "--until"),
        ({"fresh": ["zer"]}, "--fresh"),
        ({"from_stage": "e", "until_stage": "zero"}, "doesn't need"),
        ({"from_stage": "zero", "fresh": ["base"]}, "comes before --from"),
    ],
)
def test_mistakes_are_named(recipe: ResolvedRecipe, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        select(recipe, **arguments)
