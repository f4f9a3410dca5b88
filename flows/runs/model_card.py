"""The card of an exported model: what it is and was made of, how good it is, how to use it. Only what is recorded is said."""

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from flows.runs.markdown import escaped, fenced
from flows.runs.record import RunRecord
from stages.store.files import read_json
from stages.store.manifest import Manifest

Cells = list[str]
ADAPTER = "adapter"
"""Folder of a model's adapter (stages/engine/adapter_folder.py)."""
ADAPTED = (
    "The weights are those before training, and `adapter/` is what was trained: **load both** (served, it is the model "
    "`trained`). In 16 bits other programs round a layer's output before they add the adapter's, which loses most of a small "
    "update: load in float32, or export with `--merge`, which writes one model in float32."
)
"""What the card says of a model with an adapter."""


@dataclass(frozen=True)
class Prompting:
    """What chat template an exported model has."""

    origin: Literal["trained", "asked", "own", "none"]
    """That of its training; that of a stage which samples it; the base model's own; none."""
    stage: str | None
    """The stage of the recipe that the template is from."""
    exact: bool
    """Whether the chat template gives the prompts of that stage token by token, tried on questions."""

    @property
    def sentence(self) -> str:
        """The same in words."""
        if self.origin in ("own", "none"):
            own = "The chat template is the base model's own." if self.origin == "own" else "There is no chat template."
            return f"{own} Nothing in the run trained this model on prompts."
        how = "was trained" if self.origin == "trained" else "is sampled in the run"
        same = "token by token" if self.exact else "in its text, but NOT token by token with this tokenizer"
        return f"The chat template gives the prompts that the model {how} with (stage `{self.stage}`), {same}."


def serving(folder: Path, target: Path) -> str:
    """The command that serves a model. `folder`: where its files are now; `target`: where they will be."""
    command = f"vllm serve {shlex.quote(str(target))} --dtype {_dtype(folder)}"
    if (adapter := _adapter(folder)) is None:
        return command
    # vLLM takes ranks of powers of two, from 8.
    rank = max(8, 2 ** (adapter["r"] - 1).bit_length())
    return f"{command} --enable-lora --max-lora-rank {rank} --lora-modules {shlex.quote(f'trained={target / ADAPTER}')}"


def _adapter(folder: Path) -> dict[str, Any] | None:
    """The config of a model folder's adapter; None when it has none."""
    file = folder / ADAPTER / "adapter_config.json"
    return read_json(file) if file.is_file() else None


def _dtype(folder: Path) -> str:
    config = read_json(folder / "config.json")
    return str(config.get("dtype") or config.get("torch_dtype") or "auto")


def model_card(record: RunRecord, stage: str, manifest: Manifest, prompting: Prompting, folder: Path, target: Path) -> str:
    """Markdown with front matter. `folder`: where the files are now; `target`: where they will be."""
    lineage = list(_lineage(record, stage, manifest))
    base = next((item for item in lineage if item[1].kind in ("model", "toy_base")), None)
    origin = _origin(base[1], record, base[0]) if base else "unknown"
    hub = record.content["document"]["stages"].get(base[0], {}).get("hub") if base else None
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["r1-pipeline", manifest.kind]}
    front |= {"base_model": hub} if hub else {}
    settings = record.content["document"]["stages"].get(stage, {})
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {record.content['name']}: {stage}",
        f"The output of stage `{stage}` (kind `{manifest.kind}`) of run `{record.name}`, recipe "
        f"`{record.content['config_file']}`, made by R1 Pipeline. Base model: {origin}.",
        *(f"> {escaped(remark)}" for remark in manifest.remarks),
        f"## How good it is\n\n{_results(record, stage)}",
        f"## How to use it\n\n{_use(prompting, folder, target)}",
        f"## What it was made of\n\n{_table(['stage', 'kind', 'data', 'counts'], _data(record, lineage))}",
        f"## Settings of the stage\n\n{fenced(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), 'yaml')}",
        "## Licence\n\nUnknown: R1 Pipeline does not know the licences of the base model and of the data. Both bind whoever "
        "passes this model on; look them up before you do.",
        f"## Where it is from\n\n{_provenance(manifest)}",
    ]
    return "\n\n".join(sections) + "\n"


def _lineage(record: RunRecord, stage: str, manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """The stage and all that went into it, the nearest first: name in the recipe and manifest."""
    names = {record.place(name).path.name: name for name, facts in record.stages.items() if facts["folder"]}
    waiting, seen = [(stage, manifest)], {stage}
    while waiting:
        name, found = waiting.pop(0)
        yield name, found
        for item in found.inputs.values():
            below = names.get(item.stage or "")
            if below is None or below in seen:
                continue
            seen.add(below)
            # By its seal alone: digesting every model that this one came from would take long, and is not what is exported.
            try:
                waiting.append((below, Manifest.model_validate(read_json(record.place(below).manifest))))
            except (OSError, ValueError):
                print(f"stage `{below}` has no readable manifest: the card says nothing of it", file=sys.stderr)


def _origin(manifest: Manifest, record: RunRecord, name: str) -> str:
    section = record.content["document"]["stages"].get(name, {})
    if manifest.kind == "toy_base":
        return "the quickstart's toy, trained from random weights"
    parts = [f"`{key}: {section[key]}`" for key in ("hub", "revision", "path", "gguf", "gguf_package") if section.get(key)]
    gguf = manifest.notes.get("gguf")
    return " ".join(parts) + (f", `{gguf['name']}` (sha256 `{gguf['sha256']}`)" if gguf else "")


def _results(record: RunRecord, stage: str) -> str:
    rows = [(label, row) for label, row in record.results().items() if label.rpartition("/")[2] == stage]
    if not rows:
        return f"Not evaluated: no `evaluate` stage of the run names `{stage}`, or it is not finished."
    head = ["evaluation", "accuracy ± standard error", "cons@k", "mean length", "format", "language", "truncated", "problems"]
    cells = [
        [
            label.rpartition("/")[0] or "evaluation",
            f"{_percent(row.get('accuracy'))} ± {_percent(row.get('accuracy_stderr'))}",
            *(_percent(row.get("cons_at_k")), _number(row.get("mean_length"))),
            *(_percent(row.get(key)) for key in ("format", "language", "truncated")),
            f"{_number(row.get('problems'))} × {_number(row.get('samples'))} samples",
        ]
        for label, row in rows
    ]
    return f"{_table(head, cells)}\n\nThe error is over problems; problems, sampling and seed are in the recipe."


def _use(prompting: Prompting, folder: Path, target: Path) -> str:
    kwargs = 'add_generation_prompt=True, return_tensors="pt", return_dict=True'
    adapted = _adapter(folder) is not None
    dtype = "float32" if adapted else _dtype(folder)
    onto = 'model = PeftModel.from_pretrained(model, f"{folder}/adapter")\n' if adapted else ""
    first = "from peft import PeftModel\n" if adapted else ""
    return (
        f"{ADAPTED + chr(10) * 2 if adapted else ''}"
        f"{prompting.sentence} Send one message of the user; the sampling of the recipe is in `generation_config.json`.\n\n"
        f"```\n{serving(folder, target)}\n```\n\n"
        f"```python\n{first}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"folder = {str(target)!r}\n"
        f'model = AutoModelForCausalLM.from_pretrained(folder, dtype="{dtype}")\n{onto}'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        f'inputs = tokenizer.apply_chat_template([{{"role": "user", "content": "..."}}], {kwargs})\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=512)[0]))\n```"
    )


def _data(record: RunRecord, lineage: list[tuple[str, Manifest]]) -> list[Cells]:
    rows = []
    for name, manifest in lineage:
        section = record.content["document"]["stages"].get(name, {})
        source = section.get("problems") or {key: section[key] for key in ("path", "hub", "documents") if section.get(key)}
        shown = {k: v for k, v in source.items() if v is not None and not isinstance(v, dict | list)}
        counts = dict(manifest.metrics) | _whole(manifest.notes.get("problems"))
        kept = {key: counts[key] for key in COUNTS if isinstance(counts.get(key), int | float)}
        said = [", ".join(f"{key} {value}" for key, value in shown.items()), ", ".join(f"{k} {v:g}" for k, v in kept.items())]
        rows.append([f"`{name}`", manifest.kind, *said])
    return rows


COUNTS = ("problems", "documents", "held_out_documents", "sampled", "kept", "steps", "best_step", "parameters")
"""Of what a stage measured: what it was made of."""


def _whole(notes: Any) -> dict[str, Any]:
    return notes if isinstance(notes, dict) else {}


def _provenance(manifest: Manifest) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    files = [[f"`{name}`", str(facts["size"]), f"`{facts['sha256']}`"] for name, facts in manifest.files.items()]
    facts = (
        f"- stage: `{manifest.kind}` version {manifest.version}, fingerprint `{manifest.fingerprint}`\n"
        f"- finished: {manifest.finished}\n"
        f"- git commit: {f'`{manifest.git_commit}`' if manifest.git_commit else 'unknown'}\n"
        f"- versions: {versions}\n- digest of the stage's model folder: `{manifest.digest}`\n"
        f"- inputs: {', '.join(f'{role} `{item.digest}`' for role, item in manifest.inputs.items()) or 'none'}"
    )
    changed = "Chat template, tokenizer and generation config may differ from it in this copy, and this card is new."
    return f"{facts}\n\nThe stage's files. {changed}\n\n{_table(['file', 'bytes', 'sha256'], files)}"


def _table(head: Cells, rows: list[Cells]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in line)} |" for line in lines)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
