"""`r1 sample RUN STAGE PROMPT`: ask the model of a stage as its training asks it, through the same engine.

The same prompt, settings and seed give the same answers. A stage that still trains is sampled from its newest whole checkpoint.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows.cli.run import Answer, runs_of
from flows.output import one_line, printable
from flows.runs.answers import mean_logprob
from flows.runs.lookup import finished_model, folder_of, record_of
from flows.runs.record import RunRecord
from flows.runs.sampling_settings import Asking, asking
from stages.contract.errors import ExitStatus, UserError
from stages.rollout.protocol import Request, Rollout, Sampling

Asked = dict[str, Any]


def sample(options: argparse.Namespace) -> Answer:
    """`r1 sample`."""
    prompts = _prompts(options)
    record = record_of(runs_of(options), options.run, options.stage)
    ask = asking(record, options.stage)
    sampling = _sampling(ask.sampling, options)
    answered = []
    with _engine(record, options.stage, options.step, ask) as (rollout, origin):
        print(f"{record.name} {options.stage}: {origin}", file=sys.stderr)
        if ask.source is None and not options.raw:
            print("no stage of this run says how its model is asked: the template is r1_zero", file=sys.stderr)
        for prompt in prompts:
            answered.append(_answer(rollout, prompt, ask, sampling, options))
            if not options.json:
                _show(answered[-1], asked=options.stdin)
    facts = {"run": record.name, "stage": options.stage, "model": origin, "template": None if options.raw else ask.source}
    return ExitStatus.DONE, {**facts, "sampling": sampling.model_dump(), "seed": options.seed, "prompts": answered}


def _prompts(options: argparse.Namespace) -> Iterable[str]:
    if options.prompt is not None:
        return [options.prompt]
    if options.stdin:
        return [line for line in sys.stdin.read().splitlines() if line.strip()]
    if options.json or not sys.stdin.isatty():
        raise UserError("no prompt", where="command line", mend="write it behind the stage, or use --stdin: a prompt a line")
    return _asked_for()


def _asked_for() -> Iterator[str]:
    """What is typed, line by line, until Ctrl-D."""
    import readline  # noqa: F401  gives `input` its history and its arrows

    while True:
        try:
            line = input("\nprompt (Ctrl-D ends)> ")
        except EOFError:
            print()
            return
        if line.strip():
            yield line


def _sampling(default: Sampling, options: argparse.Namespace) -> Sampling:
    given = {"temperature": options.temperature, "top_p": options.top_p, "max_tokens": options.max_tokens}
    try:
        return Sampling.model_validate({**default.model_dump(), **{key: v for key, v in given.items() if v is not None}})
    except ValidationError as error:
        first = error.errors()[0]
        where = f"--{str(first['loc'][0]).replace('_', '-')}"
        raise UserError(f"{first['msg']} (given: {first['input']})", where=where) from error


@contextlib.contextmanager
def _engine(record: RunRecord, stage: str, step: int | None, ask: Asking) -> Iterator[tuple[Rollout, str]]:
    """An engine over the stage's model, and what model that is."""
    from transformers.utils.logging import disable_progress_bar

    from stages.rollout.engines import open_rollout

    disable_progress_bar()  # of loading, which takes a moment
    manifest = finished_model(record, stage)
    folder = folder_of(record, stage)
    if manifest is None or step is not None:
        yield _of_checkpoint(record, stage, step, ask)
        return
    with (
        tempfile.TemporaryDirectory(prefix="r1-sample-") as own,
        open_rollout(ask.rollout, folder.output("model"), "auto", Path(own) / "vllm.log") as rollout,
    ):
        yield rollout, f"the model of {folder.path.name}"


def _of_checkpoint(record: RunRecord, stage: str, step: int | None, ask: Asking) -> tuple[Rollout, str]:
    """By the torch engine, whatever the recipe names: a checkpoint is no model folder."""
    from stages.engine.checkpoint.model import checkpoint_model, chosen_checkpoint
    from stages.engine.settings import Lora
    from stages.rollout.torch_engine import TorchRollout, load_model, load_tokenizer, pick_device

    section = record.content["document"]["stages"].get(stage, {})
    role = {"rl": "policy", "sft": "model"}.get(section.get("kind", ""))
    if role is None:
        mend = f"wait until it is finished: `r1 status {record.name}`"
        what = f"stage `{stage}` has no model yet, and no checkpoints that can be sampled"
        raise UserError(what, where=record.name, mend=mend)
    checkpoint = chosen_checkpoint(folder_of(record, stage).checkpoints, step)
    if finished_model(record, section[role]) is None:
        raise UserError(f"the model that `{stage}` started from is gone", where=section[role])
    start = folder_of(record, section[role]).output("model")
    load = partial(load_model, start, pick_device("auto"))
    lora = Lora.model_validate(section["lora"]) if section.get("lora") else None
    model = checkpoint_model(checkpoint, load, lora, section["seed"])
    rollout = TorchRollout(model, load_tokenizer(start), ask.rollout.tokens, ask.rollout.decoder)
    return rollout, f"checkpoint {checkpoint.name} of {checkpoint.parents[1].name}"


def _answer(rollout: Rollout, prompt: str, ask: Asking, sampling: Sampling, options: argparse.Namespace) -> Asked:
    rendered = prompt if options.raw else ask.template.render(prompt)
    ids = rollout.encode(rendered)
    if not ids:
        raise UserError("the prompt is empty", where="command line", mend="write one")
    request = Request(key=prompt, prompt_ids=ids, samples=options.samples)
    found = rollout.sample([request], sampling, seed=options.seed, purpose="sample", step=0)[0]
    opened = "" if options.raw else ask.template.opened
    answers = [
        {
            "sample": number,
            "text": opened + completion.text,
            "finish": completion.finish,
            "tokens": len(completion.ids),
            "mean_logprob": mean_logprob(completion.logprobs),
            "ids": completion.ids,
        }
        for number, completion in enumerate(found)
    ]
    return {"prompt": prompt, "rendered": rendered, "prompt_ids": list(ids), "answers": answers}


def _show(found: Asked, *, asked: bool) -> None:
    if asked:
        print(f"prompt {one_line(found['prompt'])}")
    for answer in found["answers"]:
        logprob = "" if answer["mean_logprob"] is None else f" · mean log-prob {answer['mean_logprob']:.3f}"
        cut = ", cut at --max-tokens" if answer["finish"] == "length" else ""
        print(f"sample {answer['sample']} · {answer['tokens']} tokens{cut}{logprob}")
        print("\n".join(f"  | {line}" for line in printable(answer["text"]).split("\n")), flush=True)
