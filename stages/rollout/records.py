"""Sampled answers on disk: parquet, one row per answer, written whole.

Stages go on from them, so the file carries a digest of its own content: parquet alone may read damaged answers without a word.
"""

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stages.contract.errors import UserError
from stages.problems.episode import PARTS, Episode, Group, Problem, Reward
from stages.store.files import write_bytes

DIGEST = b"content_sha256"
"""Key of the digest in the file's metadata."""

SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("source", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("metadata", pa.string()),
        ("sample", pa.int32()),
        ("prompt", pa.string()),
        ("text", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        # float64: a float32 would not give back the sampler's number to the bit.
        ("logprobs", pa.list_(pa.float64())),
        ("finish", pa.string()),
        ("reward", pa.float64()),
        ("verdict", pa.string()),
        *((part, pa.float64()) for part in PARTS),  # each may be null
        ("own_parts", pa.string()),  # of the user's functions, as JSON
    ]
)
VERIFIER = pa.field("verifier", pa.string())
"""A further column where a problem names its own verifier: files without such problems are what they always were."""


def write_groups(path: Path, groups: Iterable[Group]) -> None:
    """Write groups, scored or not, so that the file appears whole."""
    rows = []
    for group in groups:
        for episode in group.episodes:
            reward = episode.reward
            row = {
                "problem_id": group.problem.id,
                "source": group.problem.source,
                "question": group.problem.question,
                "answer": group.problem.answer,
                "metadata": group.problem.metadata,
                "verifier": group.problem.verifier,
                "sample": episode.sample,
                "prompt": episode.prompt,
                "text": episode.text,
                "prompt_ids": episode.prompt_ids,
                "completion_ids": episode.completion_ids,
                "logprobs": episode.logprobs,
                "finish": episode.finish,
                "reward": reward.total if reward else None,
                "verdict": reward.verdict if reward else None,
                "own_parts": json.dumps({n: v for n, v in reward.parts.items() if n not in PARTS}) if reward else None,
            }
            rows.append(row | {part: reward.parts.get(part) if reward else None for part in PARTS})
    buffer = io.BytesIO()
    own = any(row["verifier"] is not None for row in rows)
    table = pa.Table.from_pylist(rows, schema=SCHEMA.append(VERIFIER) if own else SCHEMA)
    pq.write_table(table.replace_schema_metadata({DIGEST: _digest(table)}), buffer, compression="zstd")
    write_bytes(path, buffer.getvalue())


def read_groups(path: Path) -> list[Group]:
    """Read groups back, equal to what was written.

    Raises UserError when they cannot be.
    """
    groups: dict[str, Group] = {}
    for row in _read(path).to_pylist():
        known = (row["problem_id"], row["question"], row["answer"], row["source"], row["metadata"], row.get("verifier"))
        problem = Problem(*known)
        reward = None
        if row["reward"] is not None:
            parts = {part: row[part] for part in PARTS if row[part] is not None} | json.loads(row["own_parts"])
            reward = Reward(total=row["reward"], parts=parts, verdict=row["verdict"])
        episode = Episode(
            problem=problem,
            sample=row["sample"],
            prompt=row["prompt"],
            prompt_ids=row["prompt_ids"],
            completion_ids=row["completion_ids"],
            logprobs=row["logprobs"],
            text=row["text"],
            finish=row["finish"],
            reward=reward,
        )
        groups.setdefault(problem.id, Group(problem)).episodes.append(episode)
    return list(groups.values())


def _read(path: Path) -> pa.Table:
    mend = "remove the file: its answers are sampled again"
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
        if not (table.schema.equals(SCHEMA) or table.schema.equals(SCHEMA.append(VERIFIER))):
            raise UserError("not answers of this version", where=str(path), mend=mend)
        digest = _digest(table)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"the answers cannot be read ({error})", where=str(path), mend=mend) from error
    if (table.schema.metadata or {}).get(DIGEST) != digest:
        raise UserError("the answers are not what was written", where=str(path), mend=mend)
    return table


def _digest(table: pa.Table) -> bytes:
    """Of the content alone: the same under every compression and version of parquet."""
    found = hashlib.sha256()
    for column in table.columns:
        if pa.types.is_list(column.type):  # as bytes: they are the bulk
            whole = column.combine_chunks()
            for numbers in (whole.value_lengths(), whole.flatten()):
                found.update(numbers.to_numpy(zero_copy_only=False).tobytes())
        else:
            found.update(json.dumps(column.to_pylist()).encode())
    return found.hexdigest().encode()
