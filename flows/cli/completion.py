"""Completion in the shell, by argcomplete: `r1 completion SHELL` prints its script; for each Tab that asks this command.

Runs and stages are read from the runs folder and the recipe that the line names, so what is offered is what is there.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flows.cli.run import Answer
from stages.contract.errors import ExitStatus, UserError


def completion(options: argparse.Namespace) -> Answer:
    """`r1 completion`."""
    from argcomplete.shell_integration import shellcode

    script = shellcode(["r1"], shell=options.shell)
    if not options.json:
        print(script)
    return ExitStatus.DONE, {"shell": options.shell, "script": script}


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell, and end this process."""
    import argcomplete
    from argcomplete.completers import DirectoriesCompleter, FilesCompleter

    completers: dict[str, Any] = {
        "config": FilesCompleter(("yaml", "yml")),
        "run": _runs,
        "name": _runs,
        "stage": _stages,
        "from_stage": _stages,
        "until_stage": _stages,
        "fresh": _stages,
        "runs": DirectoriesCompleter(),
        "target": DirectoriesCompleter(),
    }
    for action in _actions(parser):
        if action.choices is None and action.nargs != 0:
            action.completer = completers.get(action.dest)  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options=False)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)


def _runs(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    folder = Path(getattr(parsed_args, "runs", None) or "runs") / "pipelines"
    return ["latest", *sorted((path.parent.name for path in folder.glob("*/pipeline.json")), reverse=True)]


def _stages(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Those of the run that the line names, else of its recipe. Nobody is told of faults here: nothing is offered then."""
    run, config = getattr(parsed_args, "run", None), getattr(parsed_args, "config", None)
    try:
        if isinstance(run, str):
            folder = Path(getattr(parsed_args, "runs", None) or "runs") / "pipelines"
            named = [folder / run] if run != "latest" else [path.parent for path in folder.glob("*/pipeline.json")]
            contents = [json.loads((path / "pipeline.json").read_text(encoding="utf-8")) for path in named]
            return list(max(contents, key=lambda content: str(content["started"]))["stages"])
        if config:
            from stages.recipe.resolve import load_recipe

            recipe = load_recipe(config)
            return [*recipe.sources, *(name for name in recipe.stages if name not in recipe.sources)]
    except (OSError, ValueError, LookupError, TypeError, UserError):
        return []
    return []
