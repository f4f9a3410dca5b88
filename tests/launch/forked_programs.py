"""Loaded by a fork server in tests: a forked process runs the program that is its first argument in place of a stage."""

import sys
from typing import Any

import stages.__main__


def run(arguments: list[str]) -> int:
    scope: dict[str, Any] = {"arguments": arguments, "module": sys.modules[__name__]}
    exec(arguments[0], scope)
    return int(scope.get("status", 0))


stages.__main__.main = run  # type: ignore[assignment]
