"""A run on disk as `r1 run` leaves it, made in no time: three stages that train, two models that were evaluated, a gate."""

import json
from pathlib import Path
from typing import Any

from stages.problems.episode import Episode, Group, Problem, Reward
from stages.rollout.records import write_groups
from stages.store.files import write_json
from stages.store.folders import PipelineFolder, Runs, StageFolder

RIGHT = {"base": [1, 0, 2], "zero": [4, 2, 0]}
"""Model -> right answers to each of three problems, of four."""


def groups(right: list[int], *, samples: int = 4, text: str = "", lengths: tuple[int, int] = (10, 6)) -> list[Group]:
    """A group for each problem; its first answers are the right ones."""
    found = []
    for number, count in enumerate(right):
        problem = Problem(f"toy:{number}", f"question {number} {text}", f"reference {number} {text}", "toy")
        group = Group(problem)
        for sample in range(samples):
            good = sample < count
            reward = Reward(float(good), {"accuracy": float(good), "format": 1.0}, "right" if good else "wrong")
            ids = [3] * lengths[0 if good else 1]
            said = f"{'good' if good else 'bad'} {number}.{sample} {text}"
            group.episodes.append(Episode(problem, sample, "", [1], ids, [-1.0] * len(ids), said, "stop", reward))
        found.append(group)
    return found


def journal(folder: StageFolder, steps: int, metrics: dict[str, float]) -> None:
    """Lines whose values rise with the steps."""
    folder.path.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": s, "of": steps, "time": s, "metrics": {n: v * s / steps for n, v in metrics.items()}}
        for s in range(1, steps + 1)
    ]
    folder.journal.write_text("".join(json.dumps(line) + "\n" for line in lines))


RL = {
    "eval/accuracy": 0.9,
    "reward/accuracy": 0.8,
    "reward/total": 1.0,
    "reward/format": 0.5,
    "reward/format_std": 0.1,
    "rollout/length": 30.0,
    "rollout/length_right": 31.0,
    "rollout/length_wrong": 20.0,
    "train/loss": 0.1,
    "train/kl": 0.01,
    "train/grad_norm": 1.0,
}


class MadeRun:
    """The run, to be changed before it is written."""

    def __init__(self, runs: Path, *, text: str = "", lr: float = 1e-4, right: dict[str, list[int]] | None = None) -> None:
        self.text, self.right = text, right or RIGHT
        self.folder: PipelineFolder = Runs(runs).prepare().new_pipeline("made")
        self.number = len(list(runs.glob("stages/*")))
        evaluate = {"kind": "evaluate", "models": list(self.right), "held_out": {"source": "toy", "count": 3}}
        self.content: dict[str, Any] = {
            "name": "made",
            "started": "2026-01-02T03:04:05.678+00:00",
            "config_file": f"configs/made.yaml{text}",
            "working_folder": "/somewhere",
            "document": {"name": "made", "stages": {"zero": {"kind": "rl", "lr": lr, "note": text}, "evaluation": evaluate}},
            "from": None,
            "until": None,
            "fresh": [],
            "status": "done",
            "error": None,
            "stages": {},
            "mlflow": {"tracking_uri": None, "experiment": None, "parent_run_id": None, "experiment_id": None},
            "models": {},
        }
        journal(self.stage("base", "toy_base"), 8, {"train/loss": 2.0})
        zero = self.stage(f"zero{text}", "rl", remarks=[f"remark {text}"], inputs=["base"])
        journal(zero, 8, RL)
        for step in (1, 8):
            write_groups(zero.rollouts / f"step-{step:06d}.parquet", groups([step % 3, 1], text=text))
        answers = {"correct": 3, f"own{text}": 2, "kept": 5}
        self.stage("data", "curate", notes={"answers": answers}, inputs=[f"zero{text}"])
        for model, right_of in self.right.items():
            folder = self.stage(f"evaluation.{model}", "evaluate_model", config={"held_out": evaluate["held_out"]})
            # Two chunks, and one left by an earlier attempt that was cut otherwise: its answers are there already.
            made = groups(right_of, text=text)
            write_groups(folder.rollouts / "chunk-00000.parquet", made[:2])
            write_groups(folder.rollouts / "chunk-00001.parquet", made[2:])
            write_groups(folder.rollouts / "chunk-00002.parquet", made[1:])
            rows = {f"toy:{n}": {"accuracy": count / 4, "mean_length": 10.0} for n, count in enumerate(right_of)}
            write_json(folder.output("report") / "problems.json", rows)
        self.summary = self.stage("evaluation", "summary", inputs=[f"evaluation.{model}" for model in self.right])
        self.write_summary({model: sum(counts) / 12 for model, counts in self.right.items()})

    def stage(self, name: str, kind: str, **facts: Any) -> StageFolder:
        """A finished stage; `inputs` are names of earlier ones."""
        runs = self.folder.path.parents[1]
        self.number += 1
        folder = StageFolder(runs / "stages" / f"{kind}-{self.number:012d}")
        folder.path.mkdir(parents=True)
        inputs = {}
        for source in facts.get("inputs", []):
            made_by = Path(self.content["stages"][source]["folder"]).name
            inputs[source] = {"digest": "d", "path": "p", "stage": made_by}
        config = {"kind": kind, **facts.get("config", {})}
        write_json(folder.config, {"kind": kind, "config": config, "inputs": inputs})
        manifest = {
            "inputs": {},
            "tokens": 1234,
            "finished": "2026-01-02T03:05:00+00:00",
            "git_commit": "abc",
            "versions": {"torch": "2"},
        }
        write_json(folder.manifest, {**manifest, "notes": facts.get("notes", {})})
        self.content["stages"][name] = {
            "kind": kind,
            "status": "done",
            "folder": str(folder.path),
            "fingerprint": "f",
            "seconds": 61.0,
            "mlflow_run_id": None,
            "remarks": facts.get("remarks", []),
        }
        return folder

    def write_summary(self, accuracy: dict[str, float]) -> None:
        """The summary's report."""
        fixed = {"mean_length": 9.0, "format": 1.0, "language": None, "truncated": 0.0, "cons_at_k": 0.5}
        models = {
            model: {"accuracy": value, "accuracy_stderr": 0.1, "problems": 3, "samples": 4, **fixed}
            for model, value in accuracy.items()
        }
        paired = {"zero - base": {"difference": 0.25, "stderr": 0.0625, "problems": 3}} if "zero" in accuracy else {}
        write_json(self.summary.output("report") / "summary.json", {"models": models, "paired": paired})

    def write(self) -> PipelineFolder:
        """Write the record."""
        self.folder.write(self.content)
        return self.folder
