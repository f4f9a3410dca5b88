"""A stage process killed again and again while answers are rewritten: none is asked for twice, the dataset is the same."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from stages.curation import sampled
from stages.kinds.curate import KIND
from stages.store.files import digest_path
from stages.store.folders import StageFolder
from stages.store.manifest import verify_manifest
from stages.tracking.journal import read
from tests.conftest import ROOT
from tests.curation.test_rewrite import rewriter, rewriting
from tests.doubles.endpoint_server import EndpointServer
from tests.kinds.test_curate import ANSWERS, Scripted, context


def test_killed_amid_rewriting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    with EndpointServer(rewriter) as server:
        monkeypatch.setattr(sampled, "opened", lambda context, prompts: nullcontext(Scripted()))
        given = context(whole, per_problem=2, **rewriting(server))
        KIND.run(given)
        asked = len(server.bodies)
        assert asked == 2 * sum(answer != "0" for answer in ANSWERS.values())
        # What is killed finds the sampled answers there: it needs no model.
        shutil.copytree(whole / "rollouts", part / "rollouts")
        record = {
            "kind": "curate",
            "version": KIND.version,
            "fingerprint": "0" * 64,
            "config": given.config.model_dump(mode="json"),
            "inputs": {"sampler": {"digest": "d1", "path": str(whole)}},
        }
        (part / "config.json").write_text(json.dumps(record))
        command = [sys.executable, "-m", "stages", str(part)]
        server.delay_s, kills = 0.1, 0
        server.served.clear()
        server.bodies.clear()
        for goal in (3, 8):
            process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
            until = time.monotonic() + 120
            while len(server.served) < goal:
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.005)
            process.kill()
            process.wait()
            kills += 1
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
        assert done.returncode == 0
        # Beside what was under way at each kill (at most two requests), everything is asked once.
        assert asked <= len(server.bodies) <= asked + 2 * kills
    assert digest_path(part / "dataset") == digest_path(whole / "dataset")
    assert verify_manifest(StageFolder(part)) is not None
    lines = [[(line.step, line.of, line.metrics) for line in read(folder / "journal.jsonl")] for folder in (whole, part)]
    assert lines[0] == lines[1]
