"""The dataset of a `curate` stage: parquet with provenance, written in pieces."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.curation.settings import CurateConfig
from stages.problems.episode import Episode
from stages.problems.templates import Template

ROWS = 10_000
"""Rows of a row group: what is in memory at once."""


@dataclass(frozen=True)
class Kept:
    """An answer that enters the dataset."""

    episode: Episode
    rewritten_by: str | None = None
    """The model that wrote it anew; None for the sampler's own words."""


class Rows:
    """How an answer becomes a row. Columns that a recipe does not ask for are left out."""

    def __init__(self, config: CurateConfig, template: Template, digests: dict[str, str]) -> None:
        """`template`: that of the dataset's prompts; `digests`: of the stage's inputs."""
        self._config, self._template, self._digests = config, template, digests
        extra = ("duplicate",) if config.duplicates is not None else ()
        self._filters = [*config.filters.names, *extra]

    def schema(self) -> Any:
        """The columns."""
        import pyarrow as pa

        texts = ("prompt", "completion", "problem_id", "question", "answer", "source")
        columns = [(name, pa.string()) for name in texts] + [("sample", pa.int64()), ("sampler_digest", pa.string())]
        columns += [(name, pa.float64()) for name in ("accuracy", "format", "language")] + [("filters", pa.list_(pa.string()))]
        asked = {
            "examples_digest": (pa.string(), self._config.few_shot),
            "rewritten": (pa.bool_(), self._config.rewrite),
            "rewritten_by": (pa.string(), self._config.rewrite),
            "review": (pa.string(), self._config.review == "required"),
        }
        return pa.schema(columns + [(name, type_) for name, (type_, wanted) in asked.items() if wanted])

    def row(self, kept: Kept) -> dict[str, Any]:
        """The row of one answer, with every column that there can be."""
        episode = kept.episode
        prompt = episode.prompt if self._config.few_shot is None else self._template.render(episode.problem.question)
        return {
            # prompt + completion is what the model saw and wrote: the part the template opened is in the prompt.
            "prompt": prompt,
            "completion": episode.text.removeprefix(self._template.opened),
            "problem_id": episode.problem.id,
            "question": episode.problem.question,
            "answer": episode.problem.answer,
            "source": episode.problem.source,
            "sample": episode.sample,
            "sampler_digest": self._digests["sampler"],
            "accuracy": episode.scored.parts["accuracy"],
            "format": episode.scored.parts["format"],
            "language": episode.scored.parts.get("language"),
            "filters": self._filters,
            "examples_digest": self._digests.get("few_shot.path"),
            "rewritten": kept.rewritten_by is not None,
            "rewritten_by": kept.rewritten_by,
            "review": "accept",
        }


class DatasetWriter:
    """Writes rows in groups of `ROWS`."""

    def __init__(self, writer: Any, rows: Rows) -> None:
        self._writer, self._rows, self._buffer = writer, rows, list[dict[str, Any]]()

    def add(self, kept: Kept) -> None:
        """Add one row."""
        self._buffer.append(self._rows.row(kept))
        if len(self._buffer) == ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what has gathered."""
        import pyarrow as pa

        if self._buffer:
            self._writer.write_table(pa.Table.from_pylist(self._buffer, schema=self._rows.schema()))
            self._buffer = []


@contextmanager
def dataset_writer(path: Path, rows: Rows) -> Iterator[DatasetWriter]:
    """A writer of the file at `path`."""
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, rows.schema()) as file:
        writer = DatasetWriter(file, rows)
        yield writer
        writer.flush()
