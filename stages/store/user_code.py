"""Modules of the user's (reward functions): where they are searched, which files they consist of.

The recipe file's folder and the working directory at submission are the *code folders*. They come last on `sys.path` of every
process that runs user code, so that a `datasets/` beside the recipe never hides the installed `datasets`. A stage's folder
carries them (`code_folders` in config.json), so they reach ranks, Slurm steps, pods and other machines alike; from a stage's
process they go on to the processes below it in the environment variable `R1_CODE_FOLDERS`.
"""

import ast
import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from stages.contract.errors import UserError

VARIABLE = "R1_CODE_FOLDERS"
"""JSON list of the code folders, for child processes."""
ROOT = Path(__file__).resolve().parents[2]
"""Where the packages `flows` and `stages` lie."""
OURS = ("flows", "stages")
_INSTALLED = ("site-packages", "dist-packages")
"""Names of folders whose modules are installed, wherever PYTHONPATH has them."""


def code_folders(recipe_file: Path | str) -> tuple[str, ...]:
    """Absolute paths of the recipe file's folder and the working directory, in the order of the search."""
    folder = Path(recipe_file).absolute().parent
    return tuple(dict.fromkeys([str(folder.resolve() if ".." in folder.parts else folder), str(Path.cwd())]))


def inherited_code_folders() -> tuple[str, ...]:
    """The code folders that the parent process has passed on; without any the working directory."""
    text = os.environ.get(VARIABLE)
    return tuple(json.loads(text)) if text else (str(Path.cwd()),)


def use_code_folders(folders: Sequence[str]) -> None:
    """Put the code folders last on `sys.path`, and pass them on to child processes.

    Entries of PYTHONPATH that name one of them, and the clone itself, move back with them: before the installed packages a
    `datasets/` in there would hide the installed one.
    """
    clone = [] if _is_installed(str(ROOT)) else [str(ROOT)]
    chosen = {_normal(entry) for entry in ["", *clone, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]}
    late = {_normal(folder) for folder in [*folders, *clone]} & chosen
    first = [entry for entry in sys.path if _normal(entry) not in late]
    present = {_normal(entry) for entry in first}
    last = {_normal(folder): folder for folder in [*clone, *folders] if _normal(folder) not in present}
    sys.path[:] = [*first, *last.values()]
    os.environ[VARIABLE] = json.dumps(list(folders))
    importlib.invalidate_caches()


def child_environment(environment: Mapping[str, str] | None = None, *, ours: bool = True) -> dict[str, str]:
    """The environment of a Python process that finds nothing of the working directory before installed packages.

    `ours`: it finds the packages `flows` and `stages`. Its text is UTF-8 whatever the locale is: logs are read as
    UTF-8.
    """
    inherited = os.environ if environment is None else environment
    cwd = _normal("")
    # An empty entry means the working directory, which as a code folder comes last.
    entries = [entry for entry in inherited.get("PYTHONPATH", "").split(os.pathsep) if _normal(entry) not in (cwd, str(ROOT))]
    path = os.pathsep.join([*([str(ROOT)] if ours else []), *entries])
    return {**inherited, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8"}


def module_files(module: str, folders: Sequence[str], where: str = "") -> dict[str, Path]:
    """The user's files that importing `module` reads: dotted name -> file, the module's own first.

    Follows the import statements of each file, inside functions too, as long as they lead into the code folders or PYTHONPATH.
    Empty for an installed module.

    Raises UserError when there is no such module, when a file is not Python, and when an installed module hides one of them.
    """
    importlib.invalidate_caches()
    if not _own_files(module, folders, where) and _installed(module, folders) is None:
        places = ", ".join(f"{folder}{'' if Path(folder).is_dir() else ' (no such folder here)'}" for folder in folders)
        mend = f"put {module.partition('.')[0]}.py beside the recipe, or install it"
        raise UserError(f"there is no module `{module}` in {places}, nor an installed one", where=where, mend=mend)
    return _followed([(module, where)], folders)


def file_name(module: str, path: Path) -> str:
    """A module's file relative to the folder in which it was found: `pkg.words` -> `pkg/words.py`."""
    name = f"{module}.__init__" if path.stem == "__init__" else module
    return name.replace(".", "/") + "".join(path.suffixes)


def imported_files(file: Path, folders: Sequence[str]) -> dict[str, Path]:
    """The user's files that a Python file imports: dotted name -> file. Raises UserError as `module_files` does."""
    importlib.invalidate_caches()
    return _followed([(name, str(file)) for name in _imports(file.stem, file)], folders)


def _followed(waiting: list[tuple[str, str]], folders: Sequence[str]) -> dict[str, Path]:
    """The user's files of modules and of all that they import. `waiting`: each module's name, and what names it, for errors."""
    files: dict[str, Path] = {}
    while waiting:
        name, place = waiting.pop(0)
        for part, file in _own_files(name, folders, place).items():
            if part not in files:
                files[part] = file
                waiting += [(imported, str(file)) for imported in _imports(part, file)]
    return files


def check_not_hidden(module: str, folders: Sequence[str], where: str = "") -> None:
    """Raise UserError when `module` is a file of the user's and Python would import an installed module in its place."""
    importlib.invalidate_caches()
    _own_files(module, folders, where)


def _own_files(name: str, folders: Sequence[str], where: str) -> dict[str, Path]:
    """Files of a dotted name and of the packages above it, in the code folders or on PYTHONPATH; empty if not there."""
    if name.partition(".")[0] in OURS:
        return {}
    files: dict[str, Path] = {}
    path = _own_entries(folders)
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        part = ".".join(parts[:count])
        spec, below = _search(part, path)
        if spec is not None and spec.origin:
            files[part] = Path(spec.origin)
        path = below
        if not path:
            break  # an attribute of the module above, a module without others below it, or nothing at all
    if files and (installed := _installed(name, folders)) is not None:
        hidden, top = next(iter(files.values())), name.partition(".")[0]
        origin = installed.origin if installed.has_location else f"Python's own `{top}`"
        what = f"{hidden} is hidden by the installed module of the same name ({origin})"
        raise UserError(what, where=where, mend=f"give `{top}` another name")
    return files


def _search(name: str, entries: Sequence[str]) -> tuple[ModuleSpec | None, list[str]]:
    """The file of a module by its full name, and the folders of what is below it.

    Each folder is asked by itself: `PathFinder` looks for a package without __init__.py among those that are imported.
    """
    below: list[str] = []
    for entry in entries:
        finder = pkgutil.get_importer(entry)
        spec = finder.find_spec(name) if finder is not None else None
        if spec is not None and spec.loader is not None:
            return spec, list(spec.submodule_search_locations or ())
        below += list(spec.submodule_search_locations or ()) if spec is not None else []
    return None, below


def _own_entries(folders: Sequence[str]) -> list[str]:
    """Folders of user code in the order of the search: PYTHONPATH, which Python puts first, then the code folders."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [*(e for e in entries if e and _normal(e) != str(ROOT) and not _is_installed(e)), *folders]


def _is_installed(entry: str) -> bool:
    return any(part in _INSTALLED for part in Path(entry).parts)


def _installed(name: str, folders: Sequence[str]) -> ModuleSpec | None:
    """The installed module or package that the first part of `name` would be; None if there is none."""
    top = name.partition(".")[0]
    own = {_normal(entry) for entry in ["", *_own_entries(folders)]} - ({str(ROOT)} if top in OURS else set())
    others = [entry for entry in sys.path if _normal(entry) not in own]
    for finder in sys.meta_path:
        spec = finder.find_spec(top, others if finder is PathFinder else None)
        # A folder without __init__.py is a package to Python, but whatever else has the name comes before it.
        if spec is not None and (spec.has_location or spec.origin in ("built-in", "frozen")):
            return spec
    return None


def _imports(name: str, file: Path) -> Iterator[str]:
    """Dotted names that a file imports. Raises UserError when it cannot be read or parsed."""
    if file.suffix != ".py":
        return
    try:
        tree = ast.parse(file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=str(file)) from error
    except SyntaxError as error:
        raise UserError(f"SyntaxError: {error.msg}", where=f"{file}: line {error.lineno}", mend="fix it there") from error
    except (ValueError, RecursionError, MemoryError) as error:  # NUL bytes; nested too deeply
        raise UserError(f"not readable as Python ({error})", where=str(file)) from error
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            if base is not None:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")
        elif isinstance(node, ast.Call) and (text := _imported_by_call(node)):
            yield text


def _absolute(node: ast.ImportFrom, package: str) -> str | None:
    if not node.level:
        return node.module
    parts = package.split(".") if package else []
    above = parts[: len(parts) - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])]) or None


def _imported_by_call(node: ast.Call) -> str | None:
    """The module of `import_module("name")` or `__import__("name")`."""
    function = node.func
    called = function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    argument = node.args[0] if node.args else None
    if called in ("import_module", "__import__") and isinstance(argument, ast.Constant) and isinstance(argument.value, str):
        return argument.value if argument.value.strip(".") == argument.value else None
    return None


def _normal(entry: str) -> str:
    return os.path.abspath(entry or os.curdir)  # noqa: PTH100 - as text: compared, never opened
