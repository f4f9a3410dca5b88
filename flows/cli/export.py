"""`r1 export RUN STAGE TARGET`: a stage's model as a folder of its own that others can load and serve.

The weights are copied, not linked: whoever changes the copy must not change what the stage's manifest vouches for. The chat
template is the one that the model was trained with, so that a served model reads the prompts it knows.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli.run import Answer, runs_of
from flows.runs.lookup import finished_model, folder_of, record_of
from flows.runs.model_card import Prompting, model_card, serving
from flows.runs.record import RunRecord
from flows.runs.sampling_settings import Asking, asking, data_of
from stages.contract.errors import ExitStatus, UserError
from stages.problems.chat_template import chat_template
from stages.store.files import digest_files, files_below, read_json, whole_folder, write_bytes, write_json

if TYPE_CHECKING:
    from stages.rollout.token_text import TokenText

SPARE = 1.05
"""The copy is begun when the disk has so many times its size free."""
PROBES = ("What is 2 + 2?", " <b>{{ 7 }}</b>\n\nTwo lines, a brace {% and Grüße.\n", "4*3+2*6=?")
"""Questions whose prompts are compared token by token."""
TEMPLATE_FILE = "chat_template.jinja"
ADAPTER = "adapter"
"""Folder of a model's adapter (stages/engine/adapter_folder.py)."""


def export(options: argparse.Namespace) -> Answer:
    """`r1 export`."""
    target = _empty(options.target)
    record = record_of(runs_of(options), options.run, options.stage)
    manifest = finished_model(record, options.stage)
    if manifest is None:
        mend = f"go on with `r1 resume {record.name}`; `r1 sample` reads checkpoints"
        raise UserError(f"stage `{options.stage}` is not finished", where=record.name, mend=mend)
    source = folder_of(record, options.stage).output("model")
    if options.merge and not any(name.startswith(f"{ADAPTER}/") for name in manifest.files):
        raise UserError(f"the model of stage `{options.stage}` has no adapter", where="--merge", mend="leave it out")
    # Merged weights are float32, twice as large as those of 16 bits, which are there meanwhile.
    size = sum(int(facts["size"]) for facts in manifest.files.values()) * (3 if options.merge else 1)
    _demand_room(target, size)
    ask = asking(record, options.stage)
    try:
        with whole_folder(target) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)
            if digest_files(folder) != manifest.files:
                raise UserError("the copy is not what was read", where=str(target), mend="look at the disk; nothing was left")
            if options.merge:
                _merge(folder)
            prompting = _prompting(folder, record, options.stage, ask)
            if prompting.stage is not None:
                _generation(folder, ask)
            card = model_card(record, options.stage, manifest, prompting, folder, target)
            write_bytes(folder / "README.md", card.encode())
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror or error})", where=str(target), mend="name another") from error
    document = {
        "run": record.name,
        "stage": options.stage,
        "folder": str(target),
        "model_digest": manifest.digest,
        "bytes": sum(path.stat().st_size for path in files_below(target)),
        "template": vars(prompting),
    }
    adapted = document["adapter"] = (target / ADAPTER).is_dir()
    serve = document["serve"] = serving(target, target)
    if not options.json:
        both = f"load both: the weights before training, and {ADAPTER}/ (README.md says how)\n" if adapted else ""
        print(f"{target}: {document['bytes'] / 2**20:.1f} MiB\n{both}{prompting.sentence}\nserve it: {serve}")
    return ExitStatus.DONE, document


def _empty(text: str) -> Path:
    """The absolute target, which is not there yet or an empty folder."""
    target = Path(os.path.abspath(text))  # noqa: PTH100  `..` goes away, links stay
    try:
        free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=text, mend="name another folder") from error
    if not free or target == target.parent:
        raise UserError("the target is not an empty folder", where=text, mend="name one that does not exist yet")
    return target


def _demand_room(target: Path, size: int) -> None:
    there = next(parent for parent in target.parents if parent.is_dir())
    free = shutil.disk_usage(there).free
    if free < size * SPARE:
        what = f"no room: {size * SPARE / 2**20:.0f} MiB are needed, {free / 2**20:.0f} MiB are free"
        raise UserError(what, where=str(there), mend="name another disk, or see `r1 gc`")


def _merge(folder: Path) -> None:
    """Make a folder of weights and adapter one of float32 weights alone."""
    import torch

    from stages.engine.adapters import merged
    from stages.rollout.torch_engine import load_model

    model = merged(load_model(folder), torch.float32)
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
        file.unlink()
    shutil.rmtree(folder / ADAPTER)
    model.save_pretrained(folder)


def _prompting(folder: Path, record: RunRecord, stage: str, ask: Asking) -> Prompting:
    """Give the copied tokenizer the template of the training as its chat template, and see what comes of it."""
    from stages.rollout.token_text import TokenText
    from stages.rollout.torch_engine import load_tokenizer

    tokenizer = load_tokenizer(folder)
    section = record.content["document"]["stages"][stage]
    trained = ask.source is not None and ask.source in (stage, *data_of(section))
    if not trained and (tokenizer.chat_template or ask.source is None):
        return Prompting("own" if tokenizer.chat_template else "none", None, exact=False)
    _write_template(folder, chat_template(ask.template, _begin(TokenText(tokenizer))))
    again = load_tokenizer(folder)
    text = TokenText(again)
    exact = all(_chat_ids(again, question) == text.prompt(ask.template.render(question)) for question in PROBES)
    return Prompting("trained" if trained else "asked", ask.source, exact)


def _chat_ids(tokenizer: Any, question: str) -> list[int]:
    message = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False))


def _begin(text: "TokenText") -> str:
    """What the tokenizer itself puts before a text, which a chat template has to say in words."""
    return "".join(text.tokenizer.convert_ids_to_tokens(text.affixes[0]))


def _write_template(folder: Path, text: str) -> None:
    """Into the file that transformers and vLLM read first; an older place of it is emptied, so that there is one truth."""
    write_bytes(folder / TEMPLATE_FILE, text.encode())
    path = folder / "tokenizer_config.json"
    if path.is_file() and "chat_template" in (config := read_json(path)):
        write_json(path, {key: value for key, value in config.items() if key != "chat_template"})
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)


def _generation(folder: Path, ask: Asking) -> None:
    """Sampling as in the recipe becomes the model's default, which transformers and vLLM take."""
    path = folder / "generation_config.json"
    config = read_json(path) if path.is_file() else {}
    config = {key: value for key, value in config.items() if key not in ("do_sample", "temperature", "top_p", "top_k")}
    config["do_sample"] = ask.sampling.temperature > 0
    if config["do_sample"]:
        # Without `top_k` transformers would look at the 50 likeliest tokens alone.
        config |= {"temperature": ask.sampling.temperature, "top_p": ask.sampling.top_p, "top_k": 0}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
