"""Crashes at chosen moments: a stage forked off a process that has imported everything, killed at its n-th durable operation.

With `power`, what was not synced is thrown away first, as when the power fails: content that was not synced becomes empty,
renames whose folder was not synced are undone, an appended line that was not synced is cut off.
"""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from stages.contract.errors import Interrupted
from stages.kinds.registry import stage_kind
from stages.recipe.resolve import load_recipe
from stages.store import files
from stages.store.files import TEMPORARY, digest_files
from stages.store.folders import StageFolder
from stages.tracking.journal import read
from tests.conftest import ROOT

TINY = ROOT / "tests" / "pipeline" / "tiny.yaml"
OVERRIDES = [
    # One that knows something, for the others to start from.
    "stages.grown={kind: toy_base, hidden: 32, intermediate: 64, layers: 2, heads: 2, steps: 150, batch: 32}",
    "stages.grown.documents={operations_min: 1, operations_max: 1}",
    "stages.base.steps=6",
    "stages.base.checkpoints.every=2",
    "stages.zero.steps=4",
    "stages.zero.lr=1e-3",
    "stages.zero.kl=0.01",
    "stages.zero.minibatches=2",
    "stages.zero.reference_every=1",
    "stages.zero.evaluation={every: 1, problems: 4}",
    "stages.ppo={kind: rl, policy: base, algorithm: ppo, steps: 4, questions: 4, samples: 4, lr: 1e-3, critic: {pretrain: 1}}",
    "stages.ppo.rewards={accuracy: 1.0, format: 0.1, verifier: exact, require_thinking: false, language_target: digits}",
    "stages.ppo.evaluation={every: 2, problems: 4}",
    "stages.ppo.checkpoints.every=2",
    "stages.cold_start_data={samples: 4, count: 40, chunk: 16, filters: {min_language: 0, min_thinking: 0}}",
    "stages.cold_start={batch: 4, epochs: 2, checkpoints: {every: 2}}",
    "stages.evaluation={chunk: 4, samples: 1}",
]
"""The tiny recipe, smaller still; its stages do everything that the big ones do."""


def prepare(folder: Path, name: str, inputs: dict[str, Path]) -> StageFolder:
    """A stage folder as `r1 run` prepares it."""
    config = load_recipe(TINY, OVERRIDES).stages[name]
    kind = stage_kind(config.kind)
    record = {
        "kind": kind.name,
        "version": kind.version,
        "fingerprint": "0" * 64,
        "config": config.model_dump(mode="json"),
        "inputs": {role: {"digest": "0", "path": str(path)} for role, path in inputs.items()},
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(record))
    return StageFolder(folder)


class Disk:
    """What of a folder would survive a power failure."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shadow = folder.with_name(f"{folder.name}-shadow")
        self.synced: dict[Path, int] = {}
        self.renames: list[tuple[Path, Path, Path | None]] = []

    def see(self, event: str, path: Path, source: Path | None) -> None:
        if event == "synced":
            self.synced[path] = path.stat().st_size
        elif event == "rename" and path.exists():
            # What the rename is about to replace, in case that it has to come back.
            self.shadow.mkdir(exist_ok=True)
            kept = self.shadow / str(len(list(self.shadow.iterdir())))
            shutil.copytree(path, kept) if path.is_dir() else shutil.copy2(path, kept)
            self.renames.append((source, path, kept))
        elif event == "rename":
            self.renames.append((source, path, None))
        elif event == "renamed":
            moved = {f: n for f, n in self.synced.items() if f == source or source in f.parents}
            for file, size in moved.items():
                del self.synced[file]
                self.synced[path / file.relative_to(source) if file != source else path] = size
        elif event == "folder synced":
            self.renames = [r for r in self.renames if path not in (r[1].parent, r[0].parent)]

    def fail(self) -> None:
        """Throw away what was not synced."""
        for file in self.folder.rglob("*"):
            if not file.is_file() or "attempts" in file.parts:
                continue
            size = self.synced.get(file)
            unsure = any(part.startswith(TEMPORARY) for part in file.parts) or file.name == "journal.jsonl"
            if size is None and unsure:
                os.truncate(file, 0)
            elif size is not None and file.stat().st_size > size:
                os.truncate(file, size)
        for source, target, kept in reversed(self.renames):
            if not target.exists():
                continue
            target.rename(source)
            if kept is not None:
                kept.rename(target)


def attempt(
    folder: StageFolder, *, at: int | None = None, after_s: float | None = None, power: bool = False
) -> tuple[int, int]:
    """Run the stage in a forked process; returns (exit status or −signal, durable operations seen).

    at: kill it at its n-th durable operation, from 1; after_s: kill it after so long.
    """
    counted = folder.path.with_name(f"{folder.path.name}-events")
    counted.write_text("0")
    pid = os.fork()
    if pid == 0:
        _child(folder, counted, at, power)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return code, int(counted.read_text() or 0)


def _child(folder: StageFolder, counted: Path, at: int | None, power: bool) -> None:
    from stages.__main__ import run_stage

    log = os.open(folder.path.with_name(f"{folder.path.name}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    seen, lock, disk = [0], threading.Lock(), Disk(folder.path)

    def watcher(event: str, path: Path, source: Path | None) -> None:
        if not path.is_relative_to(folder.path):
            return
        with lock:
            seen[0] += 1
            if event in ("write", "rename", "append") and seen[0] == at:
                crash()
            disk.see(event, path, source)
            if seen[0] == at:
                crash()

    def crash() -> None:
        if power:
            disk.fail()
        os.kill(os.getpid(), signal.SIGKILL)

    files.watch(watcher)
    status = 3
    try:
        run_stage(folder)
        status = 0
    except Interrupted:
        status = 75
    except BaseException:  # noqa: BLE001  it is told by the log and the status
        traceback.print_exc()
    finally:
        counted.write_text(str(seen[0]))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def result(folder: StageFolder) -> dict[str, object]:
    """All that has to be the same however often the stage was interrupted: outputs, rollouts, metrics."""
    found: dict[str, object] = {}
    for name in ("model", "dataset", "report", "rollouts"):
        if (folder.path / name).exists():
            found[name] = digest_files(folder.path / name)
    found["curves"] = [
        (line.step, line.of, {k: v for k, v in line.metrics.items() if not k.startswith("time/")})
        for line in read(folder.journal)
    ]
    manifest = json.loads(folder.manifest.read_text())
    found["manifest"] = {key: manifest[key] for key in ("digest", "metrics", "remarks", "tokens", "notes")}
    return found


Done = dict[str, tuple[StageFolder, dict[str, object]]]


def stages(root: Path) -> Done:
    """Every stage of the small recipe, done without interruption: name -> (its folder, its result)."""
    done: Done = {}
    for name, inputs in INPUTS.items():
        folder = prepare(root / name, name, paths(done, inputs))
        status, _ = attempt(folder)
        assert status == 0, folder.path.with_name(f"{name}.log").read_text()[-3000:]
        done[name] = (folder, result(folder))
    return done


INPUTS: dict[str, dict[str, tuple[str, str]]] = {
    "grown": {},
    "base": {},
    "zero": {"policy": ("grown", "model")},
    "ppo": {"policy": ("grown", "model")},
    "cold_start_data": {"sampler": ("grown", "model")},
    "cold_start": {"model": ("grown", "model"), "data": ("cold_start_data", "dataset")},
    "evaluation.zero": {"model": ("zero", "model")},
}
"""Stage -> role -> the stage and output that it takes."""


def paths(done: Done, inputs: dict[str, tuple[str, str]]) -> dict[str, Path]:
    """Where the inputs lie."""
    return {role: done[stage][0].output(output) for role, (stage, output) in inputs.items()}


def crashed_everywhere(root: Path, done: Done, name: str, rng: random.Random) -> dict[str, int]:
    """Crash the stage at every durable operation, go on, and compare; returns what was counted.

    The power fails at each of them; at every third the process alone is killed as well, and every third time the second attempt
    is crashed too. Raises AssertionError where a result differs.
    """
    inputs = paths(done, INPUTS[name])
    _, events = attempt(prepare(root / "probe", name, inputs))
    counts = {"operations": events, "crashes": 0}
    for point in range(1, events + 1):
        for power in (True, False) if point % 3 == 0 else (True,):
            folder = prepare(root / f"{point}-{power}", name, inputs)
            status, _ = attempt(folder, at=point, power=power)
            counts["crashes"] += status == -signal.SIGKILL
            if point % 3 == 1:
                status, _ = attempt(folder, at=rng.randrange(1, events), power=power)
                counts["crashes"] += status == -signal.SIGKILL
            status, _ = attempt(folder)
            log = folder.path.with_name(f"{folder.path.name}.log").read_text()
            assert status == 0, f"{name}, operation {point}, power {power}: exit {status}\n{log[-3000:]}"
            assert result(folder) == done[name][1], f"{name}, operation {point}, power {power}: another result"
            shutil.rmtree(folder.path)
            shutil.rmtree(folder.path.with_name(f"{folder.path.name}-shadow"), ignore_errors=True)
    return counts


def warm() -> None:
    """Import what stages import, so that forked attempts start at once."""
    import deepspeed
    import lm_eval
    import torch
    import transformers

    import stages.engine.deepspeed_engine
    import stages.evals.lm
    import stages.rl.train
    import stages.supervised.train  # noqa: F401

    assert all((deepspeed, lm_eval, transformers))
    torch.set_num_threads(1)
