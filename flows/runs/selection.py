"""Which stages of a recipe a run works on: `--from`, `--until`, `--fresh`. Pure; nothing here touches the disk."""

from dataclasses import dataclass

from stages.contract.config import stage_inputs
from stages.contract.errors import UserError
from stages.contract.suggest import nearest
from stages.recipe.resolve import ResolvedRecipe


@dataclass(frozen=True)
class Selection:
    """What to do with each stage of a recipe; stages in none of the lists are left alone."""

    order: list[str]
    """Stages to go through, in running order."""
    finished: set[str]
    """Those of them that must be finished already."""
    fresh: set[str]
    """Those of them that are computed again in a new folder."""


def select(
    recipe: ResolvedRecipe, from_stage: str | None = None, until_stage: str | None = None, fresh: list[str] | None = None
) -> Selection:
    """Choose the stages. Names may be the recipe's, or those that an evaluation expands into.

    "Before" and "after" mean needs: `--from` demands that all that the stage needs is finished, `--until` runs the stage
    and what it needs. Raises UserError for a name the recipe doesn't have, and for a range without stages.
    """
    needed = needs(recipe)
    order = list(recipe.stages)
    finished: set[str] = set()
    if until_stage is not None:
        wanted = _expand(recipe, until_stage, "--until")
        kept = wanted | {need for name in wanted for need in needed[name]}
        order = [name for name in order if name in kept]
    if from_stage is not None:
        first = _expand(recipe, from_stage, "--from")
        if not first & set(order):
            raise UserError(
                f"`{until_stage}` doesn't need `{from_stage}`", where="--from", mend="swap --from and --until, or drop one"
            )
        finished = {need for name in first for need in needed[name]} - first
    again = {name for text in fresh or [] for name in _expand(recipe, text, "--fresh")}
    if clash := sorted(again & finished):
        raise UserError(f"`{clash[0]}` comes before --from", where="--fresh", mend=f"use --from {clash[0]}")
    return Selection(order=order, finished=finished & set(order), fresh=again & set(order))


def needs(recipe: ResolvedRecipe) -> dict[str, set[str]]:
    """Stage -> every stage it needs, directly or not."""
    found: dict[str, set[str]] = {}
    for name, config in recipe.stages.items():  # in running order: inputs come first
        direct = {target for target, _ in stage_inputs(config).values()}
        found[name] = direct | {further for target in direct for further in found[target]}
    return found


def _expand(recipe: ResolvedRecipe, name: str, where: str) -> set[str]:
    if name in recipe.sources:
        return set(recipe.sources[name])
    if name in recipe.stages:
        return {name}
    raise UserError(f"no stage `{name}`", where=where, mend=nearest(name, recipe.sources.keys() | recipe.stages.keys()))
