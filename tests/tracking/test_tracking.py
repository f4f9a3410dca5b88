"""MLflow fed from journals: whole curves whatever happened to the process, the stage or the server."""

import json
import shutil
import socket
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from stages.contract.errors import UserError
from stages.store.files import write_json
from stages.store.folders import Runs, StageFolder
from stages.store.manifest import StageRecord, write_manifest
from stages.tracking.compare import compare
from stages.tracking.journal import Journal, read
from stages.tracking.mlflow import pipeline_run, sender, stage_run
from stages.tracking.mlflow.pipeline_run import PipelineTracking, default_uri

DOCUMENT = {
    "name": "t",
    "stages": {
        "zero": {"kind": "rl", "seed": 0, "lr": 1e-4, "steps": 8, "problems": {"source": "toy"}},
        "cold_start": {"kind": "sft", "seed": 0, "lr": 3e-4},
    },
}


@pytest.fixture(scope="module")
def uri(tmp_path_factory, mlflow_database):
    """One database for the module."""
    return default_uri(Path(shutil.copy(mlflow_database, tmp_path_factory.mktemp("runs"))).parent)


@pytest.fixture
def folder(tmp_path):
    made = StageFolder(tmp_path / "stages" / "rl-0123456789ab")
    made.path.mkdir(parents=True)
    config = {"kind": "rl", "lr": 1e-4, "steps": 8}
    write_json(made.config, {"kind": "rl", "version": 1, "fingerprint": "f" * 64, "config": config, "inputs": {}})
    return made


@pytest.fixture
def quick(monkeypatch):
    """The sender looks and tries again without pauses."""
    monkeypatch.setattr(sender, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(sender, "RETRY_SECONDS", 0.02)


def tracking(uri, parent=None, experiment="t", **facts):
    return PipelineTracking(uri, experiment, "t-1", parent, document=DOCUMENT, tags={"git_sha": "abc"}, **facts)


def steps(folder, first, last, *, keep_through, seconds=1.0):
    journal = Journal(folder.journal, keep_through=keep_through)
    for step in range(first, last + 1):
        metrics = {"train/loss": step / 10, "time/step": seconds}
        if step % 2 == 0:
            metrics["eval/accuracy"] = step / 100
        journal.append(step, 8, metrics)


def history(uri, run_id, metric):
    return [(m.step, m.value) for m in MlflowClient(uri).get_metric_history(run_id, metric)]


def wait_until(look, seconds=20):
    until = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < until
        time.sleep(0.02)


def logged_table(client, run_id):
    document = json.loads(Path(client.download_artifacts(run_id, "answers.json")).read_text())
    return [dict(zip(document["columns"], row, strict=True)) for row in document["data"]]


def done(folder, output, files, **more):
    folder.output(output).mkdir()
    for name, text in files.items():
        (folder.output(output) / name).write_text(text)
    record = StageRecord.model_validate(json.loads(folder.config.read_text()))
    metrics = {"accuracy": 0.75, "pass@8,none": 0.5}
    facts = {"metrics": metrics, "notes": {}, "tokens": 1, "wall_seconds": 2.0, "device_seconds": 4.0, **more}
    return write_manifest(folder, record, output, **facts)


def test_a_resumed_stage_has_no_step_twice_and_none_missing(uri, folder):
    first = tracking(uri)
    stage = first.stage("zero", folder, None)
    steps(folder, 1, 5, keep_through=0)
    stage.finish("FAILED", None)
    assert [s for s, _ in history(uri, stage.run_id, "train/loss")] == [1, 2, 3, 4, 5]

    time.sleep(0.005)  # the steps taken again get other timestamps
    steps(folder, 4, 8, keep_through=3)
    again = tracking(uri, first.parent_run_id)
    assert again.parent_run_id == first.parent_run_id
    resumed = again.stage("zero", folder, stage.run_id)
    assert resumed.run_id == stage.run_id
    resumed.finish("FINISHED", None)
    assert history(uri, stage.run_id, "train/loss") == [(s, s / 10) for s in range(1, 9)]
    assert history(uri, stage.run_id, "eval/accuracy") == [(s, s / 100) for s in (2, 4, 6, 8)]
    run = MlflowClient(uri).get_run(stage.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"kind": "rl", "lr": "0.0001", "steps": "8"}
    wanted = {"stage": "zero", "kind": "rl", "fingerprint": "f" * 64, "git_sha": "abc"}
    assert wanted.items() <= run.data.tags.items()
    assert run.data.tags["mlflow.parentRunId"] == first.parent_run_id


def test_a_stage_that_learned_nothing_has_a_tag_and_its_remarks_as_description(uri, folder):
    manifest = done(folder, "model", {"w": "x"}, notes={"learning": {"outcome": "no_signal"}}, remarks=["no group", "rest"])
    for name in ("zero", "reused"):
        stage = tracking(uri).stage(name, folder, None)
        stage.finish("FINISHED", manifest)
        tags = MlflowClient(uri).get_run(stage.run_id).data.tags
        assert tags["r1.learning"] == "no_signal"
        assert tags["mlflow.note.content"] == "no group\n\nrest"


def test_a_journal_cut_back_while_it_is_followed(uri, folder):
    pipeline = tracking(uri)
    stage = pipeline.stage("zero", folder, None)
    steps(folder, 1, 5, keep_through=0)
    wait_until(lambda: len(history(uri, stage.run_id, "train/loss")) == 5)
    # The file is longer than before when it is looked at again, and its lines are of other lengths.
    steps(folder, 4, 8, keep_through=3, seconds=1.2345678)
    stage.finish("FINISHED", None)
    assert [s for s, _ in history(uri, stage.run_id, "train/loss")] == list(range(1, 9))


def test_a_reused_stage_is_replayed_into_the_new_parent(uri, folder):
    steps(folder, 1, 8, keep_through=0)
    (folder.rollouts).mkdir()
    rows = [(f"p{i // 2}", i) for i in range(8)]  # four problems, two answers each
    for step in (1, 2, 3, 4, 5):
        table = {"problem_id": [p for p, _ in rows], "sample": [i % 2 for _, i in rows]}
        table |= {c: [f"{c}{i}" for _, i in rows] for c in ("question", "answer", "text", "verdict")}
        table["reward"] = [float(i) for _, i in rows]
        pq.write_table(pa.table(table), folder.rollouts / f"step-{step:06d}.parquet")
    manifest = done(folder, "model", {"model.safetensors": "weights"})

    pipeline = tracking(uri)
    started = time.monotonic()
    stage = pipeline.stage("zero", folder, None, reused_from=folder.path.name)
    stage.finish("FINISHED", manifest)
    assert time.monotonic() - started < 10
    client = MlflowClient(uri)
    assert history(uri, stage.run_id, "train/loss") == [(s, s / 10) for s in range(1, 9)]
    run = client.get_run(stage.run_id)
    assert run.data.tags["reused_from"] == "rl-0123456789ab"
    assert run.data.metrics["result/accuracy"] == 0.75
    assert run.data.metrics["result/pass_8_none"] == 0.5
    answers = logged_table(client, stage.run_id)
    assert [row["step"] for row in answers] == [1] * 6 + [3] * 6 + [5] * 6  # three of the four groups, two answers each
    assert answers[1]["text"] == "text1"

    model = client.get_logged_model(run.outputs.model_outputs[0].model_id)
    assert (model.tags["digest"], model.tags["folder"]) == (manifest.digest, str(folder.output("model")))
    assert model.source_run_id == stage.run_id

    # Once more (a resume of a finished pipeline): nothing is doubled, the model is the same one.
    again = tracking(uri, pipeline.parent_run_id).stage("zero", folder, stage.run_id, reused_from=folder.path.name)
    again.finish("FINISHED", manifest)
    assert history(uri, stage.run_id, "result/accuracy") == [(0, 0.75)]
    assert len(history(uri, stage.run_id, "train/loss")) == 8
    assert client.get_run(stage.run_id).info.status == "FINISHED"
    assert len(logged_table(client, stage.run_id)) == 18
    assert [m.model_id for m in client.get_run(stage.run_id).outputs.model_outputs] == [model.model_id]


def test_inputs_are_linked_and_reports_kept(uri, folder, tmp_path):
    pipeline = tracking(uri)
    record = json.loads(folder.config.read_text())
    source = StageFolder(tmp_path / "toy_base-1")
    source.path.mkdir()
    write_json(source.config, record)
    made = done(source, "model", {"model.safetensors": "other weights"})
    pipeline.stage("base", source, None).finish("FINISHED", made)

    data = tmp_path / "other" / "dataset"
    data.mkdir(parents=True)
    pq.write_table(pa.table({"x": [1, 2, 3]}), data / "data.parquet")
    record["inputs"] = {
        "data": {"digest": "d" * 64, "path": str(data), "stage": "curate-1"},
        "model": {"digest": made.digest, "path": str(source.output("model")), "stage": "toy_base-1"},
    }
    write_json(folder.config, record)
    manifest = done(folder, "report", {"metrics.json": "{}"})
    stage = pipeline.stage("evaluation", folder, None)
    client = MlflowClient(uri)
    for _ in range(2):  # the second time as a resume does
        stage.finish("FINISHED", manifest)
        run = client.get_run(stage.run_id)
        assert run.info.status == "FINISHED"
        [given] = run.inputs.dataset_inputs
        assert (given.dataset.name, given.dataset.digest) == ("data", "d" * 36)
        assert json.loads(given.dataset.profile)["num_rows"] == 3
        [model] = run.inputs.model_inputs
        assert client.get_logged_model(model.model_id).tags["digest"] == made.digest
        assert [f.path for f in client.list_artifacts(stage.run_id, "report")] == ["report/metrics.json"]
        stage = pipeline.stage("evaluation", folder, stage.run_id)


def test_a_damaged_line_waits_until_it_is_cut_back(uri, folder, quick):
    pipeline = tracking(uri)
    steps(folder, 1, 5, keep_through=0)
    whole = folder.journal.read_bytes()
    folder.journal.write_bytes(whole.replace(b'"step": 4', b'"stop": 4'))
    stage = pipeline.stage("zero", folder, None)
    wait_until(lambda: stage.run_id and len(history(uri, stage.run_id, "train/loss")) == 3)
    folder.journal.unlink()
    folder.journal.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    steps(folder, 3, 8, keep_through=2)
    stage.finish("FINISHED", None)
    wait_until(lambda: not pipeline._sender.waiting())
    assert [s for s, _ in history(uri, stage.run_id, "train/loss")] == list(range(1, 9))


def test_the_parent_has_params_config_and_results_once(uri):
    pipeline = tracking(uri, experiment="parents")
    results = {"zero": {"accuracy": 0.9, "format": 1.0}}
    pipeline.finish("FINISHED", results)
    tracking(uri, pipeline.parent_run_id, "parents").finish("FINISHED", results)
    client = MlflowClient(uri)
    run = client.get_run(pipeline.parent_run_id)
    assert run.data.params == {"seed": "0", "zero.lr": "0.0001", "zero.steps": "8", "cold_start.lr": "0.0003"}
    assert run.info.status == "FINISHED"
    assert history(uri, pipeline.parent_run_id, "eval/zero/accuracy") == [(0, 0.9)]
    assert [f.path for f in client.list_artifacts(pipeline.parent_run_id)] == ["config.json"]


class Unsteady:
    """An MLflow client that goes away after so many calls, for so many calls; calls that fail may have come through."""

    def __init__(self, client, first, count, *, through):
        self._client, self._first, self._last, self._through = client, first, first + count - 1, through
        self.calls, self.failed = 0, []

    def __getattr__(self, name):
        attribute = getattr(self._client, name)
        if not callable(attribute) or name.startswith("_"):
            return attribute

        def call(*arguments, **named):
            self.calls += 1
            away = self._first <= self.calls <= self._last
            if away:
                self.failed.append(name)
            if away and not self._through:
                raise MlflowException("away")
            answer = attribute(*arguments, **named)
            if away:
                raise MlflowException("away")
            return answer

        return call


def tracked_pipeline(uri, folder, manifest, client, experiment):
    """What a run tells MLflow, through a client that may be unsteady; returns its tracking."""
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.tracking.mlflow.client.MlflowClient", lambda _: client)
        pipeline = tracking(uri, experiment=experiment, identity=experiment, note=told.append)
    steps(folder, 1, 3, keep_through=0)
    stage = pipeline.stage("zero", folder, None)
    steps(folder, 4, 8, keep_through=3)
    stage.finish("FINISHED", manifest)
    pipeline.finish("FINISHED", {"zero": {"accuracy": 0.9}})
    return pipeline, stage, told


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_whatever_call_fails_everything_is_told_once_and_in_order(uri, folder, quick, stride):
    """One call after the other fails, with the three after it; half of the time it had come through all the same."""
    steps(folder, 1, 3, keep_through=0)
    manifest = done(folder, "model", {"model.safetensors": "weights"})
    steady = Unsteady(MlflowClient(uri), 0, 0, through=False)
    tracked_pipeline(uri, folder, manifest, steady, f"steady-{stride}")
    assert steady.calls > 15
    client = MlflowClient(uri)
    for number in range(1, steady.calls + 1, stride):
        for through in (False, True):
            name = f"unsteady-{number}-{through}-{stride}"
            unsteady = Unsteady(MlflowClient(uri), number, 4, through=through)
            pipeline, stage, told = tracked_pipeline(uri, folder, manifest, unsteady, name)
            assert set(unsteady.failed[1:]) <= {"search_experiments"}, name  # nothing is changed blindly
            assert told[0].startswith("MLflow does not answer; its metrics wait on disk"), name
            assert told[1:] in (["MLflow answers again; it is sent what waited"], []), name
            found = client.search_runs([client.get_experiment_by_name(name).experiment_id])
            assert {run.info.run_id for run in found} == {pipeline.parent_run_id, stage.run_id}, name
            assert {run.info.status for run in found} == {"FINISHED"}, name
            lines = [(line.step, line.metrics["train/loss"], line.time) for line in read(folder.journal)]
            points = client.get_metric_history(stage.run_id, "train/loss")
            assert [(m.step, m.value, m.timestamp) for m in points] == lines, name
            run = client.get_run(stage.run_id)
            assert run.data.params == {"kind": "rl", "lr": "0.0001", "steps": "8"}, name
            assert history(uri, stage.run_id, "result/accuracy") == [(0, 0.75)], name
            assert len(run.outputs.model_outputs) == 1, name
            assert history(uri, pipeline.parent_run_id, "eval/zero/accuracy") == [(0, 0.9)], name


def test_a_server_that_is_away_holds_nothing_up(folder, monkeypatch):
    monkeypatch.setitem(pipeline_run.END_SECONDS, "FINISHED", 3.0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told, started = [], time.monotonic()
    pipeline = tracking(f"http://127.0.0.1:{port}", note=told.append)
    assert pipeline.parent_run_id == ""
    stage = pipeline.stage("zero", folder, None)
    steps(folder, 1, 5, keep_through=0)
    stage.finish("FINISHED", None)
    assert time.monotonic() - started < 2
    pipeline.finish("FINISHED", {"zero": {"accuracy": 0.9}})
    assert 3 <= time.monotonic() - started < 6
    assert stage.run_id == ""
    assert "not whole in MLflow: the run, zero, the results" in told[-1]


def test_a_server_that_never_answers_costs_a_run_only_stated_waits(folder, monkeypatch):
    """It takes the connection and says nothing: the first wait finds out, the others do not wait."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setitem(pipeline_run.END_SECONDS, "KILLED", 1.0)
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        started = time.monotonic()
        pipeline = tracking(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - started < 4  # an attempt, and a question whether MLflow is there at all
        started = time.monotonic()
        stages = [pipeline.stage(f"stage-{n}", folder, None) for n in range(5)]
        for stage in stages:
            stage.finish("FINISHED", None)
        assert time.monotonic() - started < 0.5
        pipeline.finish("KILLED", {})
        assert time.monotonic() - started < 2


def test_a_server_that_stops_answering_holds_a_stage_s_end_up_for_seconds(uri, folder, monkeypatch):
    monkeypatch.setattr(stage_run, "STAGE_SECONDS", 0.5)
    pipeline = tracking(uri)
    stage = pipeline.stage("zero", folder, None)
    wait_until(lambda: stage.run_id)
    hung = threading.Event()

    def hang(run_id, lines):
        hung.wait(20)
        raise MlflowException("away")

    monkeypatch.setattr(pipeline._connection, "send", hang)
    steps(folder, 1, 2, keep_through=0)
    started = time.monotonic()
    stage.finish("FINISHED", None)
    assert time.monotonic() - started < 2
    started = time.monotonic()
    pipeline.stage("one", folder, None).finish("KILLED", None)
    assert time.monotonic() - started < 2
    hung.set()


def test_what_mlflow_does_not_take_holds_nothing_else_up(uri, folder, quick, monkeypatch):
    told = []
    monkeypatch.setattr(stage_run, "STAGE_SECONDS", 0.5)
    pipeline = tracking(uri, note=told.append)
    stage = pipeline.stage("zero", folder, None)
    wait_until(lambda: stage.run_id)
    send = pipeline._connection.send

    def refuse(run_id, lines):
        if run_id == stage.run_id:
            raise MlflowException("never")
        return send(run_id, lines)

    monkeypatch.setattr(pipeline._connection, "send", refuse)
    steps(folder, 1, 2, keep_through=0)
    other = pipeline.stage("one", folder, None)
    other.finish("FINISHED", None)
    stage.finish("FINISHED", None)
    started = time.monotonic()
    pipeline.finish("FINISHED", {})
    assert time.monotonic() - started < 3
    assert told[0].startswith("MLflow did not take `zero`; it is tried again")
    assert told[-1].startswith("not whole in MLflow: zero;")
    client = MlflowClient(uri)
    statuses = [client.get_run(run_id).info.status for run_id in (pipeline.parent_run_id, other.run_id, stage.run_id)]
    assert statuses == ["FINISHED", "FINISHED", "RUNNING"]


def test_a_stage_that_is_tried_again_goes_on_in_its_run(uri, folder, quick):
    pipeline = tracking(uri)
    first = pipeline.stage("zero", folder, None)
    steps(folder, 1, 5, keep_through=0)
    first.finish("FAILED", None)
    again = pipeline.stage("zero", folder, None)
    steps(folder, 4, 8, keep_through=3)
    again.finish("FINISHED", None)
    assert again.run_id == first.run_id == pipeline.run_ids["zero"]
    assert [s for s, _ in history(uri, again.run_id, "train/loss")] == list(range(1, 9))
    assert MlflowClient(uri).get_run(again.run_id).info.status == "FINISHED"


def test_a_tracking_uri_that_cannot_be_right_is_a_mistake():
    with pytest.raises(UserError, match=r"tracking\.uri: MLflow cannot use `nowhere://x`") as caught:
        tracking("nowhere://x")
    assert "\n" not in str(caught.value)


def test_compare_shows_what_differs(tmp_path):
    runs = Runs(tmp_path).prepare()
    folders = []
    for lr, accuracy in ((1e-4, 0.9), (2e-4, 0.5)):
        folder = runs.new_pipeline("t")
        stages = {"zero": {"kind": "rl", "lr": lr, "sampling": {"temperature": 1.0}}}
        if lr == 1e-4:
            stages["extra"] = {"kind": "sft"}
        link = {"tracking_uri": "http://h:5000", "experiment_id": "7", "parent_run_id": f"id{len(folders)}"}
        summary = tmp_path / f"summary-{lr}"
        write_json(summary / "report" / "summary.json", {"models": {"zero": {"accuracy": accuracy}}})
        done = {"evaluation": {"kind": "summary", "status": "done", "folder": str(summary)}}
        folder.write({"document": {"stages": stages}, "stages": done, "mlflow": link})
        folders.append(folder)
    a, b = (f.path.name for f in folders)
    found = compare(folders)
    assert found["params"] == {"extra.kind": {a: "sft", b: None}, "zero.lr": {a: 1e-4, b: 2e-4}}
    assert found["metrics"] == {"zero": {"accuracy": {a: 0.9, b: 0.5}}}
    query = "runs=%5B%22id0%22%2C%22id1%22%5D&experiments=%5B%227%22%5D"
    assert found["address"] == f"http://h:5000/#/compare-runs?{query}"
