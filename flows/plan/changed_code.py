"""Whether the code of a kind of stage has changed since a finished stage was computed, though its version has not.

A kind's code is its module and every module under stages/ that it imports, also inside functions, but for the rooms that only
keep and show (`RECORDS`). Compared are git's file of the commit in the manifest and the file of now, as syntax trees without
doc strings: comments and formatting change nothing. What git cannot tell is said. (It cannot tell what was not committed when
the stage ran: the manifest has the commit alone.)
"""

import ast
import subprocess
from functools import cache
from pathlib import Path

from stages.kinds.registry import MODULES

ROOT = Path(__file__).resolve().parents[2]
RECORDS = (
    "stages.store",
    "stages.runtime",
    "stages.tracking",
    "stages.costs",
    "stages.kinds.registry",
    "stages.recipe",
    "stages.contract",
)
"""Rooms and modules whose code decides no result."""


def changed(kind: str, commit: str | None) -> tuple[list[str], str]:
    """Files of a kind's code that are not what they were at `commit`, and why that cannot be told (empty when it can)."""
    if commit is None:
        return [], "its manifest names no git commit, so whether its code has changed since is not known"
    if _git("cat-file", "-e", f"{commit}^{{commit}}") is None:
        return [], f"commit {commit[:10]} is not in this clone, so whether its code has changed since is not known"
    files = [str(path.relative_to(ROOT)) for path in _files(MODULES[kind])]
    told = _git("diff", "--name-only", commit, "--", *files)
    if told is None:
        return [], "git does not answer, so whether its code has changed since is not known"
    return [file for file in told.split() if _differs(file, commit)], ""


@cache
def _files(module: str) -> tuple[Path, ...]:
    """The files of a module and of all that it imports from stages/."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _path(name)
        if path is None or name in found or name.startswith(RECORDS):
            continue
        found[name] = path
        waiting += _imports(path)
    sources = {source for path in found.values() for source in path.parent.glob("*.[ch]*") if path.parent.name == "kernels"}
    return (*sorted(found.values()), *sorted(sources))


def _path(name: str) -> Path | None:
    base = ROOT.joinpath(*name.split("."))
    if base.with_suffix(".py").is_file():
        return base.with_suffix(".py")
    return base / "__init__.py" if (base / "__init__.py").is_file() else None


def _imports(path: Path) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in found if name.startswith("stages.")]


def _differs(file: str, commit: str) -> bool:
    """Whether a file that git calls changed says something else."""
    before, now = _git("show", f"{commit}:{file}"), ROOT / file
    if before is None or not now.is_file() or now.suffix != ".py":
        return True
    try:
        return _meaning(before) != _meaning(now.read_text(encoding="utf-8"))
    except SyntaxError:
        return True


def _meaning(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):  # doc strings, of attributes too
            node.body = [item for item in body if not _is_text(item)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _git(*arguments: str) -> str | None:
    """What git says; None when it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=30, check=False, encoding="utf-8"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
