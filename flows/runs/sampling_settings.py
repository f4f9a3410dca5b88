"""How the model of a stage is asked: the template, sampling and engine that its run's recipe has for it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flows.runs.record import RunRecord
from stages.problems.templates import Template
from stages.rollout.protocol import Sampling
from stages.rollout.settings import RolloutSettings

Section = dict[str, Any]


@dataclass(frozen=True)
class Asking:
    """How prompts are made and answers sampled."""

    template: Template
    sampling: Sampling
    rollout: RolloutSettings
    source: str | None
    """The stage of the recipe that has the template; None when none has, and the template is the default."""


def asking(record: RunRecord, stage: str) -> Asking:
    """What a stage was trained with: its own settings; those of its data; else those of the stages that sample its model."""
    sections: dict[str, Section] = record.content["document"]["stages"]
    names = list(_related(sections, stage))
    source = next((name for name in names if _template(sections[name]) is not None), None)
    sampled = next((sections[name] for name in names if "sampling" in sections[name]), {})
    return Asking(
        template=Template.model_validate(_template(sections[source]) if source else {}),
        sampling=Sampling.model_validate(sampled.get("sampling", {})),
        rollout=RolloutSettings.model_validate(sampled.get("rollout", {})),
        source=source,
    )


def _related(sections: dict[str, Section], stage: str) -> Iterator[str]:
    """Stages of the recipe that may say it, the nearest first."""
    if stage in sections:
        yield stage
        yield from (name for name in data_of(sections[stage]) if name in sections)
    for kind in ("evaluate", "rl", "curate"):
        yield from (name for name, other in sections.items() if other["kind"] == kind and stage in _sampled(other))


def data_of(section: Section) -> list[str]:
    """The stages whose datasets a stage of supervised training learns."""
    data = section.get("data", [])
    return [data] if isinstance(data, str) else list(data)


def _sampled(section: Section) -> list[str]:
    return [*section.get("models", []), *(section[role] for role in ("policy", "sampler") if role in section)]


def _template(section: Section) -> Section | None:
    if section["kind"] == "dataset" and section.get("question") is None:
        return None  # its prompts came as they are
    found: Section | None = section.get("template")
    return found
