"""What a Prefect server has to have for this pipeline: work pools, slots, automations. All of it can be asked for again."""

import subprocess
import sys

import httpx
import yaml
from prefect.client.orchestration import get_client
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL

from flows.launch.local import ROOT
from flows.servers.prefect_client import demand_access
from stages.contract.errors import StageFailed, UserError
from stages.store.user_code import child_environment

AUTOMATIONS_FILE = ROOT / "infra" / "automations.yaml"
POOLS = ROOT / "infra" / "work-pools"
"""Base job templates, by type of work pool, that take the place of Prefect's own."""


def demand_server() -> str:
    """The server's address. Raises UserError when none is known, StageFailed when it doesn't answer."""
    address = PREFECT_API_URL.value()
    if not address:
        mend = "start `r1 up` in another terminal, or set PREFECT_API_URL"
        raise UserError("no Prefect server is known, so nobody would run the schedule", where="PREFECT_API_URL", mend=mend)
    with get_client(sync_client=True) as client:
        if (error := client.api_healthcheck()) is not None:
            raise StageFailed(f"the Prefect server at {address} does not answer ({error})")
    demand_access()
    return str(address)


def make_pool(name: str, kind: str) -> None:
    """Make the work pool unless it is there. Raises UserError when it is there and of another type."""
    if (known := _kind_of_pool(name)) is None:
        template = POOLS / f"{kind}.json"
        more = ("--base-job-template", str(template)) if template.exists() else ()
        try:
            prefect("work-pool", "create", name, "--type", kind, *more)
            return
        except StageFailed:
            if (known := _kind_of_pool(name)) is None:  # otherwise somebody else, a worker that starts, has just made it
                raise
    if known != kind:
        mend = f"--pool-type {known}, or another --pool"
        raise UserError(f"the work pool `{name}` is of type {known}, not {kind}", where="--pool", mend=mend)


def _kind_of_pool(name: str) -> str | None:
    with get_client(sync_client=True) as client:
        try:
            return str(client.read_work_pool(name).type)
        except ObjectNotFound:
            return None


def make_slots(slots: dict[str, int]) -> dict[str, int]:
    """Make global concurrency limits, or change how many slots they have. Raises StageFailed when the server refuses one."""
    with get_client(sync_client=True) as client:
        for name, number in slots.items():
            try:
                client.upsert_global_concurrency_limit_by_name(name, number)
            except httpx.HTTPStatusError as error:
                raise StageFailed(f"the Prefect server refuses the slots `{name}` ({error.response.status_code})") from error
    return slots


def make_automations() -> list[str]:
    """Register the automations of infra/automations.yaml, or bring them up to date; returns their names.

    One that was switched off stays off.
    """
    names = []
    with get_client(sync_client=True) as client:
        for item in yaml.safe_load(AUTOMATIONS_FILE.read_text(encoding="utf-8"))["automations"]:
            wanted = AutomationCore.model_validate(item)
            known = client.read_automations_by_name(wanted.name)
            if known:
                client.update_automation(known[0].id, wanted.model_copy(update={"enabled": known[0].enabled}))
            else:
                client.create_automation(wanted)
            names.append(wanted.name)
    return names


def prefect(*arguments: str) -> None:
    """Run Prefect's own command. Raises StageFailed with what it said when it fails."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=prefect_environment(), check=False)
    if done.returncode != 0:
        said = " ".join((done.stderr.strip() or done.stdout.strip()).split())[-600:]
        raise StageFailed(f"`prefect {arguments[0]}` failed: {said}")


def prefect_environment() -> dict[str, str]:
    """The environment of Prefect's command, in which our packages can be imported and nothing of the present folder is."""
    return child_environment()
