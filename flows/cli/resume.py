"""`r1 resume RUN --set KEY=VALUE`: what may change of a run that has begun: how it runs, never what it computes."""

from typing import TYPE_CHECKING

from stages.contract.config import external_paths, semantic, stage_inputs
from stages.contract.errors import UserError
from stages.recipe.resolve import ResolvedRecipe, overridden, resolve

if TYPE_CHECKING:
    from flows.runs.record import RunRecord


def amend(record: "RunRecord", overrides: list[str]) -> None:
    """Change the run's record.

    Raises UserError for a key that decides a result, or that names the run: that is another run.
    """
    before, after = resolve(record.content["document"]), overridden(record.content["document"], overrides)
    mend = "start a run with it: `r1 run CONFIG --set …` reuses every stage that it leaves as it is"
    if _identity(before) != _identity(after):
        raise UserError("a run keeps its name, its folders, its MLflow and its stages", where="--set", mend=mend)
    for name, config in after.stages.items():
        earlier = before.stages[name]
        if any(part(earlier) != part(config) for part in (semantic, stage_inputs, external_paths)):
            raise UserError(f"this changes what `{name}` computes", where="--set", mend=mend)
    record.update(document=after.document)


def _identity(recipe: ResolvedRecipe) -> object:
    return recipe.name, recipe.runs, recipe.tracking, {name: config.kind for name, config in recipe.stages.items()}
