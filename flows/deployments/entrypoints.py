"""The flows that deployments run. Their parameters are typed and described, so that Prefect's page shows a form for them and
the server refuses what does not fit.
"""

import argparse
import contextlib
from typing import Annotated
from uuid import UUID

import httpx
from prefect import flow
from prefect.client.schemas.objects import State
from prefect.exceptions import Abort
from prefect.runtime import flow_run
from prefect.states import Failed
from pydantic import Field

from flows.doctor.checks import demand
from flows.pipeline.flow import Manner, run_and_report
from flows.runs.record import RunRecord
from flows.runs.selection import select
from flows.servers.prefect_client import impatient_client
from stages.contract.errors import StageFailed, UserError
from stages.recipe.resolve import load_recipe
from stages.runtime.proxies import keep_loopback_direct
from stages.runtime.streams import without_secrets

Retries = Annotated[int, Field(ge=0, le=20)]
Delay = Annotated[float, Field(ge=0, le=3600)]
Parallel = Annotated[int, Field(ge=1, le=64)]


@flow(name="r1-config", persist_result=False)
def run_config(
    config: str,
    overrides: list[str] | None = None,
    from_stage: str | None = None,
    until_stage: str | None = None,
    fresh: list[str] | None = None,
    retries: Retries = 0,
    retry_delay: Delay = 10.0,
    parallel: Parallel = 1,
) -> State[None]:
    """A whole recipe; stages that are finished are reused.

    Args:
        config: The recipe's file, for example configs/quickstart.yaml. Paths start from the worker's working folder.
        overrides: Settings that differ from the file's, each KEY=VALUE, for example stages.zero.lr=1e-6.
        from_stage: What this stage needs must be finished already.
        until_stage: Run this stage and what it needs, nothing after it.
        fresh: Stages to compute again although they are finished.
        retries: New attempts of a stage that failed. What only you can mend is not tried again.
        retry_delay: Seconds before the first new attempt; each further pause is twice as long.
        parallel: Stages that may run at a time, where none needs another.

    """
    manner = Manner(retries, retry_delay, parallel)
    return _run(config, overrides or [], from_stage, until_stage, fresh or [], manner)


@flow(name="r1-stage", persist_result=False)
def run_stage(
    stage: str,
    config: str,
    overrides: list[str] | None = None,
    fresh: bool = False,
    retries: Retries = 0,
    retry_delay: Delay = 10.0,
) -> State[None]:
    """One stage of a recipe alone; what it needs must be finished already.

    Args:
        stage: The stage's name in the recipe, for example reasoning.
        config: The recipe's file, for example configs/quickstart.yaml. Paths start from the worker's working folder.
        overrides: Settings that differ from the file's, each KEY=VALUE, for example stages.zero.lr=1e-6.
        fresh: Compute the stage again although it is finished.
        retries: New attempts when it failed. What only you can mend is not tried again.
        retry_delay: Seconds before the first new attempt; each further pause is twice as long.

    """
    return _run(config, overrides or [], stage, stage, [stage] if fresh else [], Manner(retries, retry_delay))


def _run(
    config: str, overrides: list[str], from_stage: str | None, until_stage: str | None, fresh: list[str], manner: Manner
) -> State[None]:
    keep_loopback_direct()
    with without_secrets():
        return _recorded(config, overrides, from_stage, until_stage, fresh, manner)


def _recorded(
    config: str, overrides: list[str], from_stage: str | None, until_stage: str | None, fresh: list[str], manner: Manner
) -> State[None]:
    try:
        recipe = load_recipe(config, overrides)
        demand(recipe, select(recipe, from_stage, until_stage, fresh), argparse.Namespace(config=config))
        record = RunRecord.create(recipe, config, from_stage, until_stage, fresh)
    except UserError as error:
        return Failed(message=str(error))
    if flow_run.id:
        # Prefect's page and `r1 status` call the run the same; without a server it keeps the name that it has.
        with contextlib.suppress(httpx.HTTPError), impatient_client() as client:
            client.set_flow_run_name(UUID(str(flow_run.id)), record.name)
    try:
        return run_and_report(record, recipe, manner)
    except Abort as signal_:
        raise StageFailed(str(signal_)) from signal_  # a worker takes an Abort for a good end
