"""`python -m tests.bench.calibration FOLDER [RECIPE]`: the stages of configs/plan/calibration.yaml, alone on the machine.

The same processes as `r1 run` starts, without Prefect and MLflow, whose servers take processor time. A stage that fails is told
and passed over, and with it what needs it. `r1 plan --calibrate FOLDER` reads what is left.
"""

import shutil
import sys
import time
from pathlib import Path

from flows.launch.attempt import launch
from flows.runs.stage_record import Finished, stage_record
from stages.contract.config import stage_inputs
from stages.contract.errors import ExitStatus
from stages.recipe.resolve import load_recipe
from stages.store.files import write_json
from stages.store.folders import Runs
from stages.store.manifest import verify_manifest

RECIPE = Path("configs/plan/calibration.yaml")


def main(folder: str, recipe_file: str | Path = RECIPE) -> int:
    """Run the stages in the file's order; 1 when one failed."""
    recipe = load_recipe(recipe_file, [f"runs={folder}"])
    runs, finished, failed = Runs(recipe.runs).prepare(), dict[str, Finished](), list[str]()
    for name in recipe.document["stages"]:
        config, started = recipe.stages[name], time.monotonic()
        if missing := [source for source, _ in stage_inputs(config).values() if source not in finished]:
            failed.append(name)
            print(f"{name}: not run, for it needs {missing[0]}", flush=True)
            continue
        record = stage_record(config, finished)
        stage = runs.stage(record.kind, record.fingerprint)
        manifest = verify_manifest(stage, record.fingerprint)
        if manifest is None:
            stage.path.mkdir(parents=True, exist_ok=True)
            write_json(stage.config, record.model_dump())
            outcome = launch(stage, config.compute)
            shutil.rmtree(stage.checkpoints, ignore_errors=True)  # gigabytes that nobody goes on from
            manifest = verify_manifest(stage, record.fingerprint) if outcome.status is ExitStatus.DONE else None
            if manifest is None:
                failed.append(name)
                print(f"{name}: {outcome.message or 'no manifest'} ({outcome.attempt / 'log.txt'})", flush=True)
                continue
        finished[name] = Finished(stage, manifest)
        print(f"{name}: {time.monotonic() - started:.1f} s, {stage.path.name}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
