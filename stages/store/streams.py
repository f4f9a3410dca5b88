"""Standard output, standard error and Python's log of this process, without secrets."""

import contextlib
import logging
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from stages.store.plain_text import survive_any_encoding
from stages.store.secrets import redact


class _Redacting:
    """A text stream that redacts what is written; all else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def redact_streams() -> None:
    """From now on what this process prints or logs is redacted, and no character in it is an error.

    Libraries that keep a stream or a logger keep these.
    """
    survive_any_encoding()
    make = logging.getLogRecordFactory()
    sys.stdout, sys.stderr = _Redacting(sys.stdout), _Redacting(sys.stderr)
    logging.setLogRecordFactory(lambda *arguments, **named: _clean(make(*arguments, **named)))


@contextlib.contextmanager
def without_secrets() -> Iterator[None]:
    """What is printed or logged in here, or raised out of here, is redacted."""
    before = sys.stdout, sys.stderr, logging.getLogRecordFactory()
    redact_streams()
    try:
        yield
    except Exception as error:
        # Prefect keeps the text of an exception that ends a flow.
        error.args = tuple(redact(item) if isinstance(item, str) else item for item in error.args)
        raise
    finally:
        sys.stdout, sys.stderr = before[:2]
        logging.setLogRecordFactory(before[2])


def _clean(record: logging.LogRecord) -> logging.LogRecord:
    try:
        text = record.getMessage()
    except (TypeError, ValueError):  # logging tells of such a mistake itself
        return record
    if (said := redact(text)) != text:
        record.msg, record.args = said, None
    if record.exc_info and record.exc_info[0] is not None:
        record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)).rstrip())
    return record
