"""Standard output, standard error and Python's log of this process, without secrets."""

import contextlib
import errno
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from stages.contract.secrets import redact
from stages.runtime.plain_text import survive_any_encoding


class _Redacting:
    """A text stream that redacts what is written; all else is the stream's own.

    Once nobody can read it any more (a closed terminal, for standard error also a closed pipe), what is written is lost: no
    run ends because of it.
    """

    def __init__(self, stream: Any, lost: tuple[int, ...]) -> None:
        """`lost`: error numbers after which the stream leads nowhere."""
        self._stream, self._lost = stream, lost

    def write(self, text: str) -> int:
        with self._or_nowhere():
            self._stream.write(redact(text))
        return len(text)

    def flush(self) -> None:
        with self._or_nowhere():
            self._stream.flush()

    @contextlib.contextmanager
    def _or_nowhere(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in self._lost:
                raise
            lead_nowhere(self._stream)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lead_nowhere(stream: Any) -> None:
    """Have what is written to a stream of this process lost from now on, what it still holds too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def redact_streams() -> None:
    """From now on what this process prints or logs is redacted, and no character in it is an error.

    Libraries that keep a stream or a logger keep these.
    """
    survive_any_encoding()
    make = logging.getLogRecordFactory()
    sys.stdout, sys.stderr = _Redacting(sys.stdout, (errno.EIO,)), _Redacting(sys.stderr, (errno.EIO, errno.EPIPE))
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


def redact_tracebacks() -> None:
    """From now on the traceback of an error that ends this process is redacted: Python prints it behind `without_secrets`."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        print(redact("".join(traceback.format_exception(kind, error, trace)).rstrip()), file=sys.stderr)

    sys.excepthook = show


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
