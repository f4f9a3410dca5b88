"""A ledger: JSON documents by key in one file, appended and synced, never written over. What is in it is never asked for again.

Each line is sealed. A torn last line (the power failed) is cut off; any other damage is told.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stages.contract.errors import UserError
from stages.store.files import append
from stages.store.seals import opened, sealed


class Ledger:
    """The documents in one file. In memory are only the places where they lie."""

    def __init__(self, path: Path) -> None:
        """Open it, or begin it.

        Raises UserError when a line is damaged.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._places: dict[str, int] = {}
        whole = 0
        with path.open("ab+") as file:
            file.seek(0)
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    self._places.setdefault(opened(json.loads(line))["key"], whole)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    mend = "copy the file again, or remove that line: what it says is asked for again"
                    raise UserError("the line is damaged", where=f"{path}: line {number}", mend=mend) from error
                whole += len(line)
            file.truncate(whole)
        self._end = whole
        self._writer = path.open("a", encoding="utf-8")
        self._reader = path.open("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.close()
        self._reader.close()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Every document."""
        return map(self.__getitem__, self._places)

    def __getitem__(self, key: str) -> dict[str, Any]:
        """The document under a key. Raises KeyError when there is none."""
        self._reader.seek(self._places[key])
        document: dict[str, Any] = json.loads(self._reader.readline())["document"]
        return document

    def add(self, key: str, document: dict[str, Any]) -> None:
        """Add a document; it is on disk when this returns. The first one under a key stays."""
        if key in self._places:
            return
        line = json.dumps(sealed({"key": key, "document": document})) + "\n"  # ASCII: characters are bytes
        append(self._writer, self.path, line)
        self._places[key] = self._end
        self._end += len(line)
