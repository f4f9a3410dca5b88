"""`r1 study`: a recipe with a section `study:`, run as any other, and its table and verdicts.

What is done is done: an arm that another study has computed is reused, and an interrupted one goes on with `r1 resume`.
"""

import argparse
from typing import Any

from flows.cli.run import Answer, start
from stages.contract.errors import ExitStatus, UserError
from stages.store.files import read_json
from stages.store.folders import StageFolder


def study(options: argparse.Namespace) -> Answer:
    """`r1 study`."""
    from stages.recipe.resolve import load_recipe

    if options.seeds is not None:
        options.overrides.append(f"study.seeds=[{options.seeds}]")
    if options.only:
        options.overrides.append(f"study.only=[{', '.join(options.only)}]")
    recipe = load_recipe(options.config, options.overrides)
    names = [name for name, config in recipe.stages.items() if config.kind == "study"]
    if not names:
        raise UserError("not a study", where=options.config, mend="add a section `study:`, or use `r1 run`")
    status, document = start(options, None, None, [])
    assert document is not None
    if status is ExitStatus.DONE:
        done = next(stage for stage in document["stages"] if stage["stage"] == names[0])
        report = StageFolder(recipe.runs / "stages" / str(done["folder"]).rsplit("/", 1)[-1]).output("report")
        document["study"] = results(report)
        if not options.json:
            print("\n" + (report / "study.md").read_text(encoding="utf-8").split("\n- ", 1)[0].split("\n![", 1)[0])
            print((report / "costs.md").read_text(encoding="utf-8"))
    return status, document


def results(report: Any) -> dict[str, Any]:
    """Table, costs and verdicts of a study's report, as JSON values."""
    found: dict[str, Any] = read_json(report / "summary.json")
    kept = {key: found[key] for key in ("variants", "starts", "seeds", "claims", "claims_left_out")}
    return {**kept, "costs": read_json(report / "costs.json"), "report": str(report)}
