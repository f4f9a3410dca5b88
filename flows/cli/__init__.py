"""The command `r1`: what it takes, one module for each command, and what it prints."""

from flows.cli.app import main

__all__ = ["main"]
