"""`r1 doctor CONFIG`: everything of a recipe that can be known before it runs. Of the network only with `--network`."""

import sys
from collections.abc import Iterator

from flows.doctor.checks import examine
from flows.doctor.finding import Finding
from flows.doctor.scope import Scope, unfinished
from flows.runs.selection import select
from stages.contract.errors import UserError
from stages.recipe.resolve import load_recipe


def examine_recipe(config: str, overrides: list[str], *, network: bool, execute: bool = True) -> Iterator[Finding]:
    """One finding after the other; a recipe that cannot be read is the only one. `execute`: call its reward functions."""
    try:
        recipe = load_recipe(config, overrides)
        _, finished = unfinished(recipe, select(recipe))
    except UserError as error:
        yield Finding("recipe", "fail", str(error), about="recipe")
        return
    files = f"{recipe.name}: {len(recipe.stages)} stages; the files that it names are there"
    yield Finding("recipe", "ok", files, about="recipe")
    scope = Scope(
        recipe,
        recipe.stages,
        finished,
        config,
        execute,
        network,
        note=lambda line: print(line, file=sys.stderr, flush=True),
    )
    yield from examine(scope)
