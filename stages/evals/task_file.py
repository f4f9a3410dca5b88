"""A YAML file of an lm-eval task, looked at without lm-eval: its form, what it includes, its functions."""

import ast
from pathlib import Path
from typing import Any

import yaml

from stages.contract.errors import UserError
from stages.contract.suggest import nearest
from stages.problems.task_files import TaskFunction, task_settings

KINDS = ("task", "group", "class")
"""Keys of which a task's file has one."""
DEEPEST = 20


def check_task_file(path: Path) -> None:
    """Raises UserError unless the file is a task's or a group's, and what it includes and calls is there."""
    settings = _with_included(path, 0)
    if not any(key in settings for key in KINDS):
        close = [nearest(key, KINDS) for key in settings if "did you mean" in nearest(key, KINDS)]
        raise UserError("names no `task` and no `group`", where=str(path), mend=(close or ["add `task: NAME`"])[0])


def _with_included(path: Path, depth: int) -> dict[str, Any]:
    try:
        settings = task_settings(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read ({error})", where=str(path), mend="name a YAML file in UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}: line {mark.line + 1}" if mark else str(path)
        raise UserError("not valid YAML", where=place, mend="fix the syntax there") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:  # what constructors say of odd values
        raise UserError(f"a value cannot be read ({error})", where=str(path), mend="quote it") from error
    if not isinstance(settings, dict):
        raise UserError("not a mapping of keys to values", where=str(path), mend="see lm-eval's task guide")
    _check_functions(settings, path)
    included = settings.get("include")
    if not isinstance(included, str):
        return settings
    if depth == DEEPEST:
        raise UserError("circular `include`", where=str(path), mend="remove one of them")
    return _with_included(path.parent / included, depth + 1) | settings


def _check_functions(value: Any, path: Path) -> None:
    """Functions beside the file are looked for in their source; those of installed modules are lm-eval's affair."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_functions(item, path)
    elif isinstance(value, TaskFunction):
        module, _, name = value.name.rpartition(".")
        file = path.parent / f"{module.replace('.', '/')}.py"
        if not file.is_file():
            return
        try:
            tree = ast.parse(file.read_bytes(), str(file))
        except (SyntaxError, ValueError) as error:
            place = f"{file}: line {error.lineno}" if isinstance(error, SyntaxError) else str(file)
            raise UserError(f"{type(error).__name__}: {error}", where=place, mend="fix the syntax there") from error
        names = _names(tree)
        if name not in names and "*" not in names:
            raise UserError(f"{file.name} has no function `{name}`", where=str(path), mend=nearest(name, names)[:300])


def _names(tree: ast.Module) -> set[str]:
    """Names that a module has, by its source; with `*` it may have others."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names
