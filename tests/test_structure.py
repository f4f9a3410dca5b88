"""The structure that a newcomer relies on: no import cycles, no crowded folder, no long file."""

import subprocess
from collections import Counter
from pathlib import Path

import grimp
import networkx as nx

from tests.conftest import ROOT

MOST_FILES = 22
"""Python files in a folder."""
MOST_LINES = 450
"""Of a Python file."""


def cycles(modules: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others. `modules`: module -> modules that it imports."""
    graph = nx.DiGraph([(name, imported) for name, imports in modules.items() for imported in imports])
    return [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]


def python_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).exists()]


def test_a_cycle_is_seen() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_module_imports_itself_through_others() -> None:
    """Imports inside functions count too."""
    graph = grimp.build_graph("flows", "stages", cache_dir=None)
    assert len(graph.modules) > 300
    assert cycles({module: graph.find_modules_directly_imported_by(module) for module in graph.modules}) == []


def test_no_folder_is_crowded() -> None:
    folders = Counter(path.parent.relative_to(ROOT).as_posix() for path in python_files())
    assert {folder: count for folder, count in folders.items() if count > MOST_FILES} == {}


def test_no_file_is_long() -> None:
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
