"""`r1 deploy`: what infra/prefect.yaml declares, registered for one recipe and one schedule; GPU slots; automations."""

import argparse
import copy
import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flows.doctor.checks import demand
from flows.launch.local import ROOT
from flows.runs.selection import select
from flows.servers.prefect_env import point_at_server
from stages.contract.errors import StageFailed, UserError
from stages.recipe.resolve import ResolvedRecipe, load_recipe
from stages.store.files import write_bytes
from stages.store.folders import Runs

PREFECT_FILE = ROOT / "infra" / "prefect.yaml"
IMAGE_FOLDER = "/srv/r1"
"""Where the image has the clone; containers start there."""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def register(options: argparse.Namespace) -> dict[str, Any]:
    """Register what was asked for; returns what there is now.

    Raises UserError for a wrong recipe, stage, schedule or number of slots and when no Prefect server is known; StageFailed
    when the server refuses.
    """
    slots = dict(map(_slots, options.slots))
    if options.config is None and not slots and not options.automations:
        mend = "name a recipe, or --slots or --automations"
        raise UserError("there is nothing to deploy", where="deploy", mend=mend)
    answer: dict[str, Any] = {}
    document = None
    if options.config is None:
        runs = Runs(Path("runs").absolute()).path
    else:
        recipe = load_recipe(options.config, options.overrides)
        demand(recipe, select(recipe, options.stage, options.stage), options, elsewhere=True)
        runs = Runs(recipe.runs).prepare().path
        document = deployment_document(recipe, options)
    point_at_server(runs)
    from prefect.exceptions import PrefectHTTPStatusError

    from flows.deployments import prefect_objects

    try:
        address = prefect_objects.demand_server()
        if slots:
            answer["slots"] = prefect_objects.make_slots(slots)
        if options.automations:
            answer["automations"] = prefect_objects.make_automations()
        if document is not None:
            answer |= _deploy(document, runs, options, address)
    except PrefectHTTPStatusError as error:
        said = f"{error.response.status_code} at {error.request.url.path}; its log says why"
        raise StageFailed(f"the Prefect server failed ({said})") from error
    if not options.json:
        _tell(answer)
    return answer


def _deploy(document: dict[str, Any], runs: Path, options: argparse.Namespace, address: str) -> dict[str, Any]:
    from flows.deployments import prefect_objects

    deployment = document["deployments"][0]
    for schedule in deployment["schedules"]:
        _check_schedule(schedule)
    file = runs / "prefect" / f"deploy-{deployment['name']}.yaml"
    write_bytes(file, yaml.safe_dump(document, sort_keys=False).encode())
    pool = deployment["work_pool"]["name"]
    prefect_objects.make_pool(pool, options.pool_type)
    prefect_objects.prefect("deploy", "--prefect-file", str(file), "--all")
    schedule = deployment["schedules"][0] if deployment["schedules"] else {}
    flow = "r1-stage" if options.stage else "r1-config"
    worker = f"PREFECT_API_URL={address} prefect worker start --pool {pool}"
    if options.pool_type == "process":
        place = "" if runs == Path("runs").absolute() else f" --runs {shlex.quote(str(runs))}"
        worker = f"r1 worker{place}" + ("" if pool == "r1" else f" --pool {pool}")
    return {
        "deployment": f"{flow}/{deployment['name']}",
        "cron": schedule.get("cron"),
        "interval": schedule.get("interval"),
        "timezone": schedule.get("timezone"),
        "parameters": deployment["parameters"],
        "work_pool": pool,
        "api": address,
        "worker": worker,
    }


def _tell(answer: dict[str, Any]) -> None:
    for name, limit in answer.get("slots", {}).items():
        print(f"slots: {limit} of `{name}` (a stage takes them with `compute: {{slots: {name}}}`)")
    for name in answer.get("automations", ()):
        print(f"automation: {name}")
    if "deployment" in answer:
        every = f"every {answer['interval']} s" if answer["interval"] else answer["cron"]
        when = f"{every} ({answer['timezone']})" if every else "no schedule; start it from Prefect's page"
        print(f"{answer['deployment']}: {when}\nits worker: {answer['worker']}")


def deployment_document(recipe: ResolvedRecipe, options: argparse.Namespace) -> dict[str, Any]:
    """infra/prefect.yaml with one deployment, which is that of this recipe.

    In a process pool its paths start from the present folder, in the others from the image's.
    """
    document: dict[str, Any] = yaml.safe_load(PREFECT_FILE.read_text(encoding="utf-8"))
    declared, inside = document["deployments"], options.pool_type != "process"
    if options.stage:
        deployment = copy.deepcopy(next(item for item in declared if "stage" in item["parameters"]))
    else:
        file = Path(options.config).resolve()
        same = (item for item in declared if (ROOT / item["parameters"]["config"]).resolve() == file)
        deployment = copy.deepcopy(next(same, declared[0]))
    name = options.name or "-".join(filter(None, [recipe.name, options.stage]))
    file, _, function = deployment["entrypoint"].partition(":")
    parameters = {
        "config": _inside(options.config) if inside else str(Path(options.config).absolute()),
        "overrides": [*options.overrides, *([] if inside else [f"runs={recipe.runs}"])],
        "retries": options.retries,
        "retry_delay": options.retry_delay,
        **({"stage": options.stage} if options.stage else {"parallel": options.parallel}),
    }
    deployment |= {
        "name": name,
        "entrypoint": deployment["entrypoint"] if inside else f"{ROOT / file}:{function}",
        "parameters": parameters,
        "schedules": _schedules(deployment["schedules"], name, options),
        "work_pool": {"name": options.pool, "job_variables": document["definitions"][options.pool_type]},
    }
    directory = IMAGE_FOLDER if inside else str(Path.cwd())
    pull = [{"prefect.deployments.steps.set_working_directory": {"directory": directory}}]
    return {"name": document["name"], "pull": pull, "deployments": [deployment]}


def _inside(config: str) -> str:
    try:
        return str(Path(config).resolve().relative_to(ROOT))
    except ValueError as error:
        mend = f"put it below {ROOT / 'configs'} and build the image again"
        raise UserError("the image has only what is in the clone", where=config, mend=mend) from error


def _schedules(declared: list[dict[str, Any]], slug: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The one that the options name, otherwise those declared; a schedule that is asked for is a schedule that fires."""
    if options.cron and options.interval:
        raise UserError("a schedule is either --cron or --interval", where="deploy", mend="leave one out")
    zone = options.timezone or (declared[0]["timezone"] if declared else "UTC")
    if options.cron:
        return [{"slug": slug, "cron": options.cron, "timezone": zone, "active": True}]
    if options.interval:
        return [{"slug": slug, "interval": _seconds(options.interval), "timezone": zone, "active": True}]
    return [{**schedule, "slug": slug, "timezone": zone, "active": True} for schedule in declared[:1]]


def _seconds(text: str) -> int:
    match = re.fullmatch(r"([1-9][0-9]{0,8})([smhd]?)", text)
    if match is None:
        raise UserError(f"`{text}` is not valid", where="--interval", mend="for example 6h, 30m, 2d, or seconds")
    return int(match[1]) * _UNITS[match[2] or "s"]


def _slots(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not name or not re.fullmatch("[0-9]{1,9}", number):
        raise UserError(f"`{text}` is not NAME=NUMBER", where="--slots", mend="for example --slots gpu=8")
    return name, int(number)


def _check_schedule(schedule: dict[str, Any]) -> None:
    from prefect.client.schemas.schedules import CronSchedule

    try:
        # An interval has a time zone too.
        CronSchedule(cron=schedule.get("cron", "0 3 * * *"), timezone=schedule["timezone"])
    except ValidationError as error:
        first = error.errors()[0]
        option = "--timezone" if "timezone" in first["loc"] else "--cron"
        given = schedule["timezone" if option == "--timezone" else "cron"]
        mend = "for example --cron '0 3 * * *' --timezone Europe/Berlin"
        raise UserError(f"`{given}` is not valid", where=option, mend=mend) from error
