"""A recipe's YAML files as one document: `extends:` merges other files below this one, `--set a.b=value` above it.

Every key remembers the file that set it, so that a mistake is named where it was made.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.contract.config import expanded_path
from stages.contract.errors import UserError
from stages.recipe.yaml_text import read_yaml

Origins = dict[tuple[str, ...], str]
"""Path of a key -> the file that set it, or `--set`."""
Document = dict[str, Any]


def read_merged(path: Path | str, origins: Origins, seen: tuple[Path, ...] = ()) -> Document:
    """The document of a file and of those that it extends; fills `origins`.

    Raises UserError when one of them cannot be read.
    """
    try:
        path = Path(expanded_path(str(path)))
        if path.resolve() in seen:
            raise UserError("`extends` goes round in a circle", where=str(path), mend="remove one of the `extends`")
        if path.exists() and not (path.is_file() or path.is_fifo()):
            raise UserError("not a file", where=str(path), mend="name a YAML file")
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except FileNotFoundError as error:
        raise UserError("no such file", where=str(path), mend="see configs/ for the shipped ones") from error
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links that go round in a circle
        raise UserError(f"cannot be read ({error})", where=str(path), mend="name a YAML file in UTF-8") from error
    document = read_yaml(text, str(path), "mend the syntax there")
    if not isinstance(document, dict):
        raise UserError("not a mapping of keys to values", where=str(path), mend="start from configs/quickstart.yaml")
    parents = document.pop("extends", [])
    merged: Document = {}
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UserError("`extends` is neither a file nor a list of files", where=f"{path}: extends", mend="name YAML files")
    for parent in parents:
        file = parent if parent.startswith("~") else path.parent / parent
        merged = _merge_files(merged, read_merged(file, origins, (*seen, path.resolve())))
    for key_path in paths_in(document):
        origins[key_path] = str(path)
    origins[()] = str(path)
    return _merge_files(merged, document)


def _merge_files(below: Document, above: Document) -> Document:
    """Deep merge; a stage that is null above and is there below is left out."""
    lower, upper = below.get("stages"), above.get("stages")
    merged = merge(below, above)
    if isinstance(lower, dict) and isinstance(upper, dict):
        left_out = {name for name, section in upper.items() if section is None and name in lower}
        merged["stages"] = {name: section for name, section in merged["stages"].items() if name not in left_out}
    return merged


def override(document: Document, text: str, origins: Origins) -> None:
    """Set one key of the document, in place. `text`: `dotted.key=value`, the value in YAML; a stage that is null is left out.

    Raises UserError when it is none of that.
    """
    key, equals, value_text = text.partition("=")
    if not equals or not key:
        raise UserError(f"`{text}` is not KEY=VALUE", where="--set", mend="for example --set stages.zero.lr=1e-6")
    value = read_yaml(value_text, f"--set {key}", "quote it")
    path = tuple(key.split("."))
    target = document
    for part in path[:-1]:
        if not isinstance(target.setdefault(part, {}), dict):
            raise UserError(f"`{part}` has no keys below it", where=f"--set {key}", mend="check the dotted key")
        target = target[part]
    for below in paths_in({path[-1]: value}):
        origins[(*path[:-1], *below)] = "--set"
    if value is None and path[:-1] == ("stages",) and path[-1] in target:
        del target[path[-1]]
        return
    target[path[-1]] = merge(target[path[-1]], value) if _both_dicts(target.get(path[-1]), value) else value


def merge(below: Document, above: Document) -> Document:
    """Deep merge; `above` wins. A section that names another `kind` or `source` replaces the one below as a whole."""
    for switch in ("kind", "source"):
        if switch in above and switch in below and above[switch] != below[switch]:
            return dict(above)
    merged = dict(below)
    for key, value in above.items():
        merged[key] = merge(merged[key], value) if _both_dicts(merged.get(key), value) else value
    return merged


def place_of(path: tuple[str, ...], origins: Origins) -> str:
    """File and dotted key; the file is the one that set the key, or the nearest section above it."""
    own = any(known[: len(path[:3])] == path[:3] for known in origins)
    if path[:1] == ("stages",) and len(path) > 2 and not own and ("shared", path[2]) in origins:
        path = ("shared", *path[2:])  # the stage has it from there
    dotted = ".".join(path)
    for end in range(len(path), -1, -1):
        if path[:end] in origins:
            return f"{origins[path[:end]]}: {dotted}" if dotted else origins[path[:end]]
    return dotted or "recipe"


def paths_in(document: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key in a document, sections and all below them."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield (*prefix, str(key))
            yield from paths_in(value, (*prefix, str(key)))


def _both_dicts(a: Any, b: Any) -> bool:
    return isinstance(a, dict) and isinstance(b, dict)
