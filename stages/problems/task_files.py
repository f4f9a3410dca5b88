"""lm-eval tasks as YAML files of the user's: which further files they consist of. Nothing here imports or runs them."""

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml

from stages.contract.config import Expanded, ExternalFile
from stages.contract.errors import UserError
from stages.store.user_code import file_name, imported_files, module_files


@dataclass(frozen=True)
class TaskFunction:
    """The value of a `!function` tag: `module.function`."""

    name: str


class _Loader(yaml.SafeLoader):
    """YAML as lm-eval writes it; other tags of its own have no meaning here."""


_Loader.add_constructor("!function", lambda _, node: TaskFunction(str(node.value)))
_Loader.add_multi_constructor("!", lambda *_: None)


def task_settings(source: str) -> Any:
    """The values of a task's YAML file, `!function` among them.

    Raises what PyYAML's safe loader does: YAMLError, and errors of its constructors for odd values.
    """
    loader = _Loader(source)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def task_parts(path: Path, folders: Sequence[str]) -> dict[str, Path]:
    """The files that a task's YAML includes, those of its functions, and the local files of its data: name -> path.

    `folders`: the code folders. Raises UserError for an included file that is missing, and for functions as
    `stages.store.user_code.module_files` does. What cannot be read as YAML has no parts: lm-eval says what is wrong with it.
    """
    parts: dict[str, Path] = {}
    waiting = [path]
    while waiting:
        file = waiting.pop()
        for key, value in _values(_read(file)):
            if isinstance(value, TaskFunction):
                parts |= _function_files(value.name, file, folders)
            elif key == "include":
                if not (included := file.parent / value).is_file():
                    raise UserError(f"includes `{value}`, which is no file", where=str(file), mend="correct its `include`")
                if value not in parts:
                    parts[value] = included
                    waiting.append(included)
            elif key in ("data_files", "data_dir") or (key == "dataset_path" and "/" in value):
                # On the hub or on the web where nothing matches; `json` and the like name a format.
                parts |= {match: Path(match) for match in sorted(glob.glob(value))}  # noqa: PTH207 - may be absolute
    return parts


TaskFile = Annotated[str, Expanded, ExternalFile(parts=task_parts, settings=True)]
"""Path of a task's YAML file."""


def _read(path: Path) -> Any:
    try:
        return task_settings(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError("no such file", where=str(path)) from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return None


def _function_files(function: str, file: Path, folders: Sequence[str]) -> Mapping[str, Path]:
    """As lm-eval searches it: beside the YAML file, then on `sys.path`."""
    module = function.rpartition(".")[0]
    beside = file.parent / f"{module.replace('.', '/')}.py"
    if beside.is_file():
        modules = {module: beside, **imported_files(beside, folders)}
    else:
        modules = module_files(module, folders, where=str(file)) if module else {}
    return {file_name(name, path): path for name, path in modules.items()}


def _values(document: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every text and function in a document, with the key that it stands under; what is below `data_files` is data."""
    if isinstance(document, dict):
        for name, value in document.items():
            yield from _values(value, key if key == "data_files" else str(name))
    elif isinstance(document, list | tuple):
        for value in document:
            yield from _values(value, key)
    elif isinstance(document, str | TaskFunction):
        yield key, document
