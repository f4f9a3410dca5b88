"""The documentation's table of architectures, made from the sweep."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from tests.architectures.build import BLOCKED
from tests.architectures.paths import SAMPLE_PATHS, TRAIN_PATHS, Paths
from tests.conftest import ROOT

TABLE = ROOT / "stages" / "engine" / "ARCHITECTURES.md"
COMMAND = "python -m tests.architectures"

HEAD = """# Architectures

Which causal language models of transformers {version} are trained and sampled, and how. Made by `{command}`, which
builds every class of transformers' causal LM mapping in the small (2 layers, float32) and compares its log-probabilities,
trained and sampled, with those of the model's own forward on each text alone. A model's real weights are checked again at the
start of every stage; a class that is refused ends the stage in one line, before anything is computed.
"""

TRAINING = """
## Training

Packed texts are the fastest. With a sliding window, texts that are longer than it are trained one text per row there, too.

"""

SAMPLING = """
## Sampling with the torch engine

Llama, Qwen2 and Qwen3 have a decoder of their own. All others are sampled by their own forward, in the first of these ways that
a probe of the model finds right.

"""

MISSING = """
## Not tried

"""


def render(found: Mapping[str, Paths]) -> str:
    """The whole page: `found` by class name."""
    train = {path: [name for name, paths in found.items() if paths.train == path] for path in TRAIN_PATHS}
    sample = {path: [name for name, paths in found.items() if paths.sample == path] for path in SAMPLE_PATHS}
    parts = [
        HEAD.format(version=version("transformers"), command=COMMAND),
        TRAINING,
        _rows(TRAIN_PATHS, train),
        SAMPLING,
        _rows(SAMPLE_PATHS, sample),
        MISSING,
        "".join(f"- {name}: {reason}\n" for name, (reason, _) in sorted(BLOCKED.items())),
    ]
    return "".join(parts)


def _rows(titles: Mapping[str, str], names: Mapping[str, list[str]]) -> str:
    rows = [
        f"| {title} ({len(names[path])}) | {', '.join(sorted(names[path], key=str.lower))} |\n"
        for path, title in titles.items()
        if names[path]
    ]
    return "| path | classes |\n|---|---|\n" + "".join(rows)


def write(found: Mapping[str, Paths], path: Path = TABLE) -> None:
    """Write the page."""
    path.write_text(render(found), encoding="utf-8")
