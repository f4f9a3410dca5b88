"""`r1 worker`: Prefect's worker, pointed at the server of `r1 up`; it runs what is scheduled in a process pool."""

import argparse
import os
import sys
from typing import NoReturn

from flows.cli.run import runs_of
from flows.servers.prefect_env import point_at_server


def work(options: argparse.Namespace) -> NoReturn:
    """Become the worker. Raises UserError when no Prefect server is known, StageFailed when it doesn't answer."""
    quiet = "PREFECT_LOGGING_LEVEL" not in os.environ
    point_at_server(runs_of(options).path)
    if quiet:
        os.environ["PREFECT_LOGGING_LEVEL"] = "INFO"
    from flows.deployments import prefect_objects

    address = prefect_objects.demand_server()
    prefect_objects.make_pool(options.pool, "process")
    print(f"worker of the pool `{options.pool}` at {address}; Ctrl-C ends it", file=sys.stderr, flush=True)
    limit = ("--limit", str(options.limit)) if options.limit else ()
    command = ["-m", "prefect", "--no-prompt", "worker", "start", "--pool", options.pool, "--type", "process", *limit]
    # Prefect finds the server in the environment, in which its first import has put it.
    environment = {**prefect_objects.prefect_environment(), "PREFECT_API_URL": address}
    os.execve(sys.executable, [sys.executable, *command], environment)  # noqa: S606 - the interpreter's own
