"""The scripts of infra/slurm under a real Slurm: a stage on two nodes, and a job that goes back into the queue and goes on."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stages.recipe.resolve import load_recipe
from stages.store.files import digest_files
from stages.tracking.journal import read
from tests import stage_process
from tests.conftest import ROOT
from tests.launch.slurm_cluster import Cluster, slurm
from tests.stage_process import finish

pytestmark = pytest.mark.slow
STEPS = 10
REASONING = [f"stages.reasoning.steps={STEPS}", "stages.reasoning.deepspeed=zero3", "stages.reasoning.checkpoints.every=4"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm(tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`r1`, for R1 of the scripts."""
    path = tmp_path_factory.mktemp("bin") / "r1"
    path.write_text(f'#!/bin/sh\nexec env PYTHONPATH="{ROOT}" "{sys.executable}" -m flows.cli "$@"\n')
    path.chmod(0o755)
    return path


def submit(cluster: Cluster, command: Path, log: Path, script: str, *arguments: object, **environment: str) -> str:
    """Submit one of the scripts on two nodes; the job's number."""
    options = ["--parsable", "--nodes=2", "--cpus-per-task=1", f"--chdir={ROOT}", f"--output={log}", "--time=20"]
    return cluster.say("sbatch", *options, ROOT / "infra/slurm" / script, *arguments, R1=str(command), **environment)


def wait(cluster: Cluster, log: Path, condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{log.read_text()[-3000:] if log.exists() else ''}\n{cluster.logs()}"
        time.sleep(0.2)


def back_in_the_queue(cluster: Cluster, job: str, log: Path) -> None:
    """Wait until the job has been put back; it need not wait there as long as Slurm makes such a job wait."""
    wait(cluster, log, lambda: cluster.state(job)[1] == 1, 90)
    wait(cluster, log, lambda: cluster.state(job)[0] != "COMPLETING", 60)
    if cluster.state(job)[0] == "PENDING":
        cluster.say("scontrol", "update", f"JobId={job}", "StartTime=now")


def steps_of(folder: Path) -> list[int]:
    return [line.step for line in read(folder / "journal.jsonl")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = load_recipe(ROOT / "tests/pipeline/tiny.yaml").stages["base"]
    return finish(stage_process.prepare(tmp_path_factory.mktemp("base") / "stage", config, {}), timeout=1200) / "model"


def prepare(folder: Path, base: Path, compute: str) -> Path:
    recipe = load_recipe(ROOT / "tests/pipeline/tiny.yaml", [*REASONING, f"stages.reasoning.compute={compute}"])
    return stage_process.prepare(folder, recipe.stages["reasoning"], {"policy": base})


def test_a_stage_on_two_nodes_goes_back_into_the_queue_and_on(
    tmp_path: Path, cluster: Cluster, command: Path, base: Path
) -> None:
    folder, log = (
        prepare(tmp_path / "stage", base, "{hosts: 2, processes: 1, launcher: slurm, threads: 1}"),
        tmp_path / "job.log",
    )
    # Both nodes are this machine, whose name the nodes' names are not.
    job = submit(cluster, command, log, "stage.sbatch", folder, "--rendezvous", "127.0.0.1:29555")
    wait(cluster, log, lambda: len(steps_of(folder)) >= 2, 600)
    cluster.say("scancel", "--batch", "--signal=USR1", job)  # as Slurm does ahead of the time limit
    back_in_the_queue(cluster, job, log)
    first = steps_of(folder)
    assert 0 < len(first) < STEPS
    wait(cluster, log, lambda: cluster.state(job)[0] in ("COMPLETED", "FAILED"), 900)
    assert cluster.state(job) == ("COMPLETED", 1), log.read_text()
    said = log.read_text()
    assert "the stage ended with 75 (start 1 of this job)" in said
    assert "the stage ended with 0 (start 2 of this job)" in said
    assert steps_of(folder) == list(range(1, STEPS + 1))
    one = finish(prepare(tmp_path / "one", base, "{processes: 2, threads: 1}"), 2)
    assert digest_files(folder / "model") == digest_files(one / "model")


STAND_IN = """#!/bin/bash
# In place of `r1`: says its run's name, is interrupted once, and done when it is resumed.
echo "$*" >>"$CALLS"
echo "run mine-20260101-1" >&2
[[ $1 == resume ]] && exit 0
trap 'exit 75' TERM
while :; do sleep 0.2; done
"""


def test_the_pipelines_script_resumes_the_run_that_it_began(tmp_path: Path, cluster: Cluster) -> None:
    r1, calls, runs, log = tmp_path / "r1", tmp_path / "calls", tmp_path / "runs", tmp_path / "job.log"
    r1.write_text(STAND_IN)
    r1.chmod(0o755)
    job = submit(cluster, r1, log, "run.sbatch", "mine.yaml", R1_RUNS=str(runs), CALLS=str(calls))
    wait(cluster, log, lambda: log.exists() and "run mine" in log.read_text(), 60)
    cluster.say("scancel", "--batch", "--signal=USR1", job)  # as Slurm does ahead of the time limit
    back_in_the_queue(cluster, job, log)
    wait(cluster, log, lambda: cluster.state(job)[0] in ("COMPLETED", "FAILED"), 120)
    assert cluster.state(job) == ("COMPLETED", 1), log.read_text()
    assert calls.read_text().splitlines() == [
        f"run mine.yaml --set runs={runs}",
        f"resume mine-20260101-1 --runs {runs}",
    ]
    again = submit(cluster, r1, log, "run.sbatch", "mine.yaml", R1_RUNS=str(runs), CALLS=str(calls))
    wait(cluster, log, lambda: len(calls.read_text().splitlines()) == 3, 60)
    cluster.say("scancel", again)  # from outside: it does not put itself back
    wait(cluster, log, lambda: cluster.state(again)[0] == "CANCELLED", 60)
    time.sleep(3)
    assert cluster.state(again) == ("CANCELLED", 0)


def test_a_cancelled_job_stays_cancelled(tmp_path: Path, cluster: Cluster, command: Path, base: Path) -> None:
    folder, log = (
        prepare(tmp_path / "stage", base, "{hosts: 2, processes: 1, launcher: slurm, threads: 1}"),
        tmp_path / "job.log",
    )
    job = submit(cluster, command, log, "stage.sbatch", folder, "--rendezvous", "127.0.0.1:29556")
    wait(cluster, log, lambda: len(steps_of(folder)) >= 1, 600)
    cluster.say("scancel", job)
    wait(cluster, log, lambda: cluster.state(job)[0] == "CANCELLED", 90)
    time.sleep(3)
    assert cluster.state(job) == ("CANCELLED", 0)


PARENT = """
import signal, sys
from pathlib import Path
from flows.launch import launch
from stages.contract.config import Compute
from stages.store.files import read_json
from stages.store.folders import StageFolder

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGUSR1, interrupt)
folder = StageFolder(Path(sys.argv[1]))
try:
    sys.exit(int(launch(folder, Compute.model_validate(read_json(folder.config)["config"]["compute"])).status))
except KeyboardInterrupt:
    sys.exit(75)
"""


def test_the_launcher_makes_a_step_of_a_stage_and_stops_it(tmp_path: Path, cluster: Cluster, base: Path) -> None:
    compute = "{hosts: 2, processes: 1, launcher: slurm, threads: 1, rendezvous: '127.0.0.1:29557'}"
    folder, log, script = prepare(tmp_path / "stage", base, compute), tmp_path / "job.log", tmp_path / "parent.sh"
    (tmp_path / "parent.py").write_text(PARENT)
    script.write_text(f'#!/bin/bash\nexport PYTHONPATH="{ROOT}"\nexec "{sys.executable}" "{tmp_path}/parent.py" "{folder}"\n')
    job = cluster.say("sbatch", "--parsable", "--nodes=2", "--no-requeue", f"--chdir={ROOT}", f"--output={log}", script)
    wait(cluster, log, lambda: len(steps_of(folder)) >= 1, 600)
    cluster.say("scancel", "--batch", "--signal=USR1", job)
    wait(cluster, log, lambda: cluster.state(job)[0] in ("COMPLETED", "FAILED"), 120)
    attempt = folder / "attempts" / "1"
    assert json.loads((attempt / "outcome.json").read_text())["status"] == "interrupted"
    assert json.loads((attempt / "ended.json").read_text())["status"] == 75
    assert list((folder / "checkpoints").glob("step-*"))
    assert json.loads((folder / "hosts/1/1/outcome-rank1.json").read_text())["status"] == "interrupted"
    assert "Exited with exit code 75" in (attempt / "launcher.log").read_text()
