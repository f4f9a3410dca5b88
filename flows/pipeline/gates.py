"""What a run makes of a gate's verdict: it goes on, goes on with a word, or ends before any later stage."""

from collections.abc import Callable
from typing import Any

from stages.contract.config import StageConfig
from stages.contract.errors import GateClosed
from stages.kinds.gate import GateConfig
from stages.store.manifest import GATE, Manifest


def heed(name: str, config: StageConfig, manifest: Manifest, run: str, note: Callable[[str], None]) -> None:
    """Raises GateClosed when the stage is a gate that stops the run, whose name is `run`.

    The verdict is the manifest's, and what follows from it the recipe's of today, so that a gate that was passed over with a
    warning stops the next run that asks for it.
    """
    if not isinstance(config, GateConfig):
        return
    judged: dict[str, Any] = manifest.notes[GATE]
    comparison = f"`{config.model}` {'better than' if config.better_than else 'not worse than'} `{config.other}`"
    verdict = f"{comparison}: {judged['verdict']}; {judged['says']}"
    if config.stops(judged["verdict"]):
        mend = f"to go on all the same: `r1 resume {run} --set stages.{name}.otherwise=warn`"
        raise GateClosed(f"the gate `{name}` stopped the run: {verdict}; {mend}")
    note(f"{name}: {verdict}" + ("" if judged["verdict"] == "passed" else "; the run goes on"))
