"""What starts a stage on other machines: settings, refusals, the JobSet; and what machines say to each other."""

import argparse
import json
import os
import time
from pathlib import Path

import pytest
import yaml
from torch.distributed import TCPStore

from flows.cli.app import main
from flows.cli.join import join_stage
from flows.launch import kubernetes, slurm
from flows.launch.launcher import Job, launcher_of
from flows.launch.local import torchrun
from stages.contract.config import Compute
from stages.contract.errors import UserError
from stages.engine.multi_node import Hosts, mark, sees
from stages.recipe.resolve import load_recipe
from stages.runtime import heartbeat
from stages.store.files import digest_path
from stages.store.folders import StageFolder
from stages.store.manifest import InputRecord
from tests.conftest import ROOT

TINY = ROOT / "tests/pipeline/tiny.yaml"
TWO = Compute(hosts=2, processes=4, rendezvous="node1:29400")


def job(tmp_path: Path, **compute: object) -> Job:
    folder = StageFolder(tmp_path / "toy_base-0123")
    return Job(folder, folder.new_attempt(), Compute.model_validate(compute))


def refusal(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("stages.zero.compute.hosts=2", "stages.zero.compute: several hosts need `rendezvous: HOST:PORT`"),
        ("stages.zero.compute.rendezvous=node1", "should be HOST:PORT, such as `node1:29400`"),
        (
            "stages.cold_start_data.compute={hosts: 2, launcher: slurm}",
            "stages.cold_start_data.compute.hosts: a stage of kind `curate` runs on one machine",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_runs(setting: str, says: str) -> None:
    assert says in refusal(lambda: load_recipe(TINY, [setting]))


def test_every_machine_is_told_its_number_and_where_to_meet() -> None:
    arguments = torchrun(TWO, 1)
    for wanted in ("--nproc_per_node=4", "--nnodes=2", "--node-rank=1", "--master-addr=node1", "--master-port=29400"):
        assert wanted in arguments
    alone = torchrun(Compute(processes=2), 0)  # one machine stays on loopback
    assert "--rdzv-conf=store_type=file" in alone
    assert "--local-addr=127.0.0.1" in alone


def test_slurm_starts_steps_within_an_allocation_that_is_large_enough(tmp_path, monkeypatch) -> None:
    wanted = job(tmp_path, hosts=2, launcher="slurm")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with (tmp_path / "log").open("wb") as log:
        assert "works within an allocation" in refusal(lambda: slurm.start(wanted, log))
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setattr(slurm.shutil, "which", lambda _: "/bin/true")
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
        assert "2 machines are wanted, the allocation has 1" in refusal(lambda: slurm.start(wanted, log))
    assert launcher_of(Compute(launcher="slurm")) == "local"


def test_the_job_set_is_filled_in(tmp_path) -> None:
    template = yaml.safe_load(kubernetes.MANIFEST.read_text())
    wanted = job(tmp_path, hosts=3, launcher="kubernetes")
    document = kubernetes.rendered(template, wanted, "stage.yaml")
    name = document["metadata"]["name"]
    assert name == "r1-toy-base-0123"
    (ranks,) = document["spec"]["replicatedJobs"]
    spec = ranks["template"]["spec"]
    assert (spec["parallelism"], spec["completions"]) == (3, 3)
    arguments = spec["template"]["spec"]["containers"][0]["args"]
    assert arguments == [
        *(str(wanted.folder.path), "--attempt", str(wanted.attempt)),
        *("--rendezvous", "r1-toy-base-0123-ranks-0-0.r1-toy-base-0123:29400"),
    ]
    alone = kubernetes.rendered(template, job(tmp_path, launcher="kubernetes"), "stage.yaml")
    spec = alone["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert "--rendezvous" not in spec["template"]["spec"]["containers"][0]["args"]
    assert spec["completions"] == 1
    assert yaml.safe_load(kubernetes.MANIFEST.read_text()) == template
    assert "a Job, and no JobSet" in refusal(lambda: kubernetes.rendered({"kind": "Job"}, wanted, "mine.yaml"))
    assert "no JobSet with one job" in refusal(lambda: kubernetes.rendered({"kind": "JobSet"}, wanted, "mine.yaml"))


@pytest.mark.parametrize(
    ("conditions", "status"),
    [
        ([], None),
        ([{"type": "StartupPolicyCompleted", "status": "True"}], None),
        ([{"type": "Completed", "status": "True"}], 0),
        ([{"type": "Completed", "status": "False"}, {"type": "Failed", "status": "True"}], 1),
    ],
)
def test_a_job_set_has_ended_when_the_cluster_says_so(conditions, status) -> None:
    assert kubernetes.ended(json.dumps({"status": {"conditions": conditions}})) == status
    assert kubernetes.ended("") == 1


def test_without_kubectl_it_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with (tmp_path / "log").open("wb") as log:
        assert "no `kubectl` on the PATH" in refusal(lambda: kubernetes.start(job(tmp_path, launcher="kubernetes"), log))


def test_who_cannot_join_is_told(tmp_path, capsys) -> None:
    assert main(["join", str(tmp_path / "none"), "--node-rank", "1"]) == 2
    assert "no stage's folder, nor a run's" in capsys.readouterr().err
    folder = StageFolder(tmp_path)
    folder.config.write_text(json.dumps({"config": {"compute": TWO.model_dump()}}))
    options = argparse.Namespace(node_rank=2, rendezvous=None, interface=None, attempt=None)
    assert "there is no machine 2; the stage is on 2: 0 to 1" in refusal(lambda: join_stage(folder, options))
    folder.config.write_text("{}")
    assert "not the config of a stage on several machines" in refusal(lambda: join_stage(folder, options))


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Two machines' sides, in one process, of which each sees the store."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(heartbeat, "PERIOD", 0.05)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "GROUP_WORLD_SIZE": 2, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    sides = []
    for number in (0, 1):
        monkeypatch.setenv("GROUP_RANK", str(number))
        (tmp_path / str(number)).mkdir()
        sides.append(Hosts(tmp_path / str(number), number, 1.0))
    yield sides
    for side in sides:  # their threads would talk to a store that is gone
        side._left = True
    time.sleep(0.2)
    del store


def wait(condition) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < 10
        time.sleep(0.01)
    return time.monotonic() - began


def test_a_machine_that_falls_silent_is_missed(pair) -> None:
    words = []
    pair[0].watch(words.append)
    assert 0.5 < wait(lambda: words) < 5
    assert words[0]["status"] == "failed"
    assert "machine 1 has given no sign of life for 1 s" in words[0]["message"]


def test_a_machine_that_has_done_its_part_is_not_missed(pair) -> None:
    first, second = pair
    words = []
    second.watch(words.append)
    first.watch(words.append)
    wait(lambda: first._heard[1][0])
    second.leave({"status": "done"})
    wait(lambda: first._gone == {1})
    first._heard[1] = (b"", time.monotonic() - 100)
    time.sleep(0.3)
    assert words == []


def test_one_machine_fails_and_the_other_ends_in_its_words(pair) -> None:
    first, second = pair
    words = []
    for side in pair:
        side.watch(words.append)
    (second._attempt / "progress-rank1").touch()
    wait(lambda: (first._attempt / "progress-host1").exists())  # the parent's watchdog sees that the other one gets on
    second.leave({"status": "mistake", "message": "no such file", "mend": "make it"})
    wait(lambda: words)
    assert words == [{"rank": 1, "host": 1, "status": "mistake", "message": "no such file", "mend": "make it"}]


def test_machines_agree_on_the_stage_and_on_what_only_each_has(pair, tmp_path) -> None:
    first, second = pair
    own, model = tmp_path / "own", tmp_path / "model.bin"
    own.mkdir()
    model.write_bytes(b"weights")
    digest = digest_path(model)

    def inputs(stage: str | None = "base-1", path: Path = model) -> dict[str, InputRecord]:
        return {"policy": InputRecord(digest=digest, path=str(path), stage=stage)}

    first.agree(tmp_path, "f", inputs())
    second.agree(own, "f", inputs())
    assert "another computation" in refusal(lambda: second.agree(own, "g", inputs()))
    assert "`policy` is missing on this machine" in refusal(lambda: second.agree(own, "f", inputs(path=tmp_path / "none")))
    model.write_bytes(b"other")
    assert "`policy` is not what the first machine has" in refusal(lambda: second.agree(own, "f", inputs()))
    second.agree(tmp_path, "f", inputs())  # a stage's output in a folder that both see was verified by the pipeline
    assert "is not what" in refusal(lambda: second.agree(tmp_path, "f", inputs(stage=None)))
    token = mark(own)
    assert sees(own, token)
    assert not sees(tmp_path, token)
    assert os.listdir(own) == [".first-host"]  # noqa: PTH208
