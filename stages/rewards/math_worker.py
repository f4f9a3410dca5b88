"""The process in which math-verify runs: a pair of answers per line in, a verdict per line out.

math-verify guards itself with SIGALRM, which works in a main thread only, and does not interrupt one long operation on
big integers. Here it runs without its guard in a process that the parent can kill; should the parent be gone, the kernel
ends it at its limit of processor time.
"""

import json
import logging
import math
import os
import re
import resource
import sys

READY = "ready"
MEMORY_LIMIT_BYTES = 4 << 30
"""Address space: a tower of powers asks for all there is."""


def main(seconds: float) -> None:
    """Answer the lines of standard input until it ends. `seconds`: the limit of processor time per line."""
    lines, verdicts = sys.stdin, os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not be taken for a verdict
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    logging.disable(logging.WARNING)
    _load()
    print(READY, file=verdicts)
    for line in lines:
        used = resource.getrusage(resource.RUSAGE_SELF)
        # One second more than the parent waits: as long as it lives, it is the parent that ends this process.
        limit = math.ceil(used.ru_utime + used.ru_stime + seconds + 1)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        print(judge(*json.loads(line)), file=verdicts)


def _load() -> None:
    import math_verify  # noqa: F401 - paid before the first limit runs


def judge(reference: str, answer: str) -> str:
    """`right`, `wrong`, or `none` when the reference cannot be read. Has no limit of its own."""
    from math_verify import parse, verify

    gold = parse(_boxed(reference), parsing_timeout=None)
    if not gold:
        return "none"
    found = parse(_boxed(answer), parsing_timeout=None)
    return "right" if verify(gold, found, timeout_seconds=None) else "wrong"


def _boxed(text: str) -> str:
    """The text as one boxed expression: math-verify then reads the whole of it instead of picking what looks best."""
    plain = " ".join(text.split())
    if (whole := re.fullmatch(r"\$\$?([^$]+)\$\$?|\\\((.+)\\\)|\\\[(.+)\\\]", plain)) is not None:
        plain = next(part for part in whole.groups() if part)
    return plain if plain.startswith("\\boxed{") else f"\\boxed{{{plain}}}"


if __name__ == "__main__":
    main(float(sys.argv[1]))
