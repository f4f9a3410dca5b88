"""What a run's last lines say was learned, and what they propose."""

from pathlib import Path
from typing import Any

from flows.pipeline.conclusion import learned, next_commands
from flows.runs.record import RunRecord
from stages.store.folders import PipelineFolder

SECTIONS: dict[str, Any] = {
    "base": {"kind": "toy_base"},
    "zero": {"kind": "rl", "policy": "base", "steps": 60},
    "gate": {"kind": "gate", "model": "zero"},
    "cold_start": {"kind": "sft", "model": "gate"},
}


class Measured(RunRecord):
    """A record whose reports say this."""

    def __init__(self, folder: Path, accuracies: dict[str, tuple[float, float]], sections: dict[str, Any]) -> None:
        stages = {name: {"kind": section["kind"], "status": "done"} for name, section in sections.items()}
        super().__init__(
            PipelineFolder(folder / "runs" / "pipelines" / "toy-1"), {"document": {"stages": sections}, "stages": stages}
        )
        self.accuracies = accuracies

    def results(self) -> dict[str, dict[str, float]]:
        return {name: {"accuracy": mean, "accuracy_stderr": error} for name, (mean, error) in self.accuracies.items()}


def test_learned_compares_each_trained_model_with_the_one_it_started_from(tmp_path: Path) -> None:
    measured = {"base": (0.443, 0.02), "zero": (0.947, 0.01), "cold_start": (0.92, 0.01)}
    assert learned(Measured(tmp_path, measured, SECTIONS)) == (
        "zero raised accuracy from 44.3 % (base) to 94.7 % in 60 steps; "
        "cold_start: no change of accuracy beyond the sampling error (94.7 % in zero, 92.0 %)."
    )
    measured["cold_start"] = (0.90, 0.01)  # 4.7 points are more than 2 x 1.41
    assert learned(Measured(tmp_path, measured, SECTIONS)).endswith("cold_start lowered accuracy from 94.7 % (zero) to 90.0 %.")


def test_learned_without_two_measured_models_counts_the_stages(tmp_path: Path) -> None:
    said = "4 of 4 stages are finished; no evaluation compares a trained model with the one that it started from."
    assert learned(Measured(tmp_path, {"zero": (0.9, 0.01)}, SECTIONS)) == said


def test_next_commands_name_what_the_run_has(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [line.split("#")[0].strip() for line in next_commands(Measured(tmp_path, {}, SECTIONS))]
    assert commands == ["r1 rollouts toy-1 zero", "r1 sample toy-1 zero", "r1 up"]
    monkeypatch.chdir("/")
    commands = [line.split("#")[0].strip() for line in next_commands(Measured(tmp_path, {}, {"rows": {"kind": "dataset"}}))]
    runs = f"--runs {tmp_path}/runs"
    assert commands == [f"r1 up {runs}", f"r1 report toy-1 {runs}", f"r1 status toy-1 {runs}"]
