"""`r1 deploy`: what infra/prefect.yaml declares, registered for one recipe and one schedule."""

import argparse
import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flows.launchers.local import ROOT
from flows.prefect_home import point_at_server
from stages.recipe import ResolvedRecipe, load_recipe
from stages.store.errors import StageFailed, UserError
from stages.store.files import write_bytes
from stages.store.folders import Runs

PREFECT_FILE = ROOT / "infra" / "prefect.yaml"


def register(options: argparse.Namespace) -> dict[str, Any]:
    """Register the deployment, with its work pool where there is none yet; returns what was registered.

    Raises UserError for a wrong recipe, cron text or time zone and when no Prefect server is known; StageFailed when the
    server refuses.
    """
    recipe = load_recipe(options.config, options.overrides)
    Runs(recipe.runs).prepare()
    document = _document(recipe, options)
    deployment = document["deployments"][0]
    file = recipe.runs / "prefect" / f"deploy-{deployment['name']}.yaml"
    write_bytes(file, yaml.safe_dump(document, sort_keys=False).encode())
    point_at_server(recipe.runs)
    pool = deployment["work_pool"]["name"]
    schedule = deployment["schedules"][0]
    _check_schedule(schedule)
    address = _make_pool(pool)
    _prefect("deploy", "--prefect-file", str(file), "--all")
    answer = {
        "deployment": f"r1-config/{deployment['name']}",
        "cron": schedule["cron"],
        "timezone": schedule["timezone"],
        "parameters": deployment["parameters"],
        "work_pool": pool,
        "api": address,
        "worker": f"PREFECT_API_URL={address} prefect worker start --pool {pool}",
    }
    if not options.json:
        print(f"{answer['deployment']}: {schedule['cron']} ({schedule['timezone']})\nits worker: {answer['worker']}")
    return answer


def _document(recipe: ResolvedRecipe, options: argparse.Namespace) -> dict[str, Any]:
    """infra/prefect.yaml with one deployment, which is that of this recipe; its paths start from the present folder."""
    document: dict[str, Any] = yaml.safe_load(PREFECT_FILE.read_text(encoding="utf-8"))
    deployment = copy.deepcopy(document["deployments"][0])
    schedule = {**deployment["schedules"][0], "slug": options.name or recipe.name}
    schedule |= {key: value for key in ("cron", "timezone") if (value := getattr(options, key))}
    file, _, function = deployment["entrypoint"].partition(":")
    parameters = {
        "config": str(Path(options.config).absolute()),
        "overrides": [*options.overrides, f"runs={recipe.runs}"],
    }
    deployment |= {
        "name": options.name or recipe.name,
        "entrypoint": f"{ROOT / file}:{function}",
        "parameters": parameters,
        "schedules": [schedule],
    }
    pull = [{"prefect.deployments.steps.set_working_directory": {"directory": str(Path.cwd())}}]
    return {**document, "pull": pull, "deployments": [deployment]}


def _check_schedule(schedule: dict[str, Any]) -> None:
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
    except ValidationError as error:
        first = error.errors()[0]
        option = "--timezone" if "timezone" in first["loc"] else "--cron"
        given = schedule["timezone" if option == "--timezone" else "cron"]
        mend = "for example --cron '0 3 * * *' --timezone Europe/Berlin"
        raise UserError(f"`{given}` is not valid", where=option, mend=mend) from error


def _make_pool(name: str) -> str:
    """Make the process work pool unless it is there; returns the server's address."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.settings import PREFECT_API_URL

    address = PREFECT_API_URL.value()
    if not address:
        mend = "start `r1 up` in another terminal, or set PREFECT_API_URL"
        raise UserError("no Prefect server is known, so nobody would run the schedule", where="PREFECT_API_URL", mend=mend)
    with get_client(sync_client=True) as client:
        if (error := client.api_healthcheck()) is not None:
            raise StageFailed(f"the Prefect server at {address} does not answer ({error})")
        try:
            client.read_work_pool(name)
        except ObjectNotFound:
            _prefect("work-pool", "create", name, "--type", "process")
    return str(address)


def _prefect(*arguments: str) -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        said = " ".join((done.stderr.strip() or done.stdout.strip()).split())[-600:]
        raise StageFailed(f"`prefect {arguments[0]}` failed: {said}")
