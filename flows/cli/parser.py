"""The grammar of the daily commands: look at what was sampled, talk to a model, hand it over, make room, complete."""

import argparse
import re
from collections.abc import Callable
from typing import TypeVar

P = TypeVar("P", bound=argparse.ArgumentParser)


def add_daily_commands(command: Callable[..., P], place: P, code: P) -> None:
    """Add them. `command` adds one; `place` has the option `--runs`, `code` has `--no-code`."""
    run, stage = "a run's name, or `latest`", "a stage's name in its recipe"
    rollouts = command("rollouts", "Read what was sampled, also while a stage runs; the newest step comes first.", place)
    rollouts.add_argument("run", metavar="RUN", help=run)
    rollouts.add_argument("stage", metavar="STAGE", help=f"{stage}: of kind rl, curate or evaluate")
    rollouts.add_argument("--step", type=_count, help="of this step of training, or chunk of problems")
    rollouts.add_argument("--last", metavar="N", type=_positive, help="of the N newest steps")
    rollouts.add_argument("--verdict", choices=("right", "wrong", "none", "unjudged"))
    rollouts.add_argument("--problem", metavar="ID", help="answers to this problem")
    rollouts.add_argument("--sort", choices=("reward", "length"), help="the largest first")
    rollouts.add_argument("--limit", type=_count, default=20, help="most answers; 0: all (default: 20)")
    rollouts.add_argument("--follow", action="store_true", help="print new answers as they are recorded")
    sample = command("sample", "Ask the model of a stage, as its training asks it.", place)
    sample.add_argument("run", metavar="RUN", help=run)
    sample.add_argument("stage", metavar="STAGE", help=f"{stage}: of a kind that hands over a model")
    sample.add_argument("prompt", metavar="PROMPT", nargs="?", help="the question; on a terminal none: you are asked")
    sample.add_argument("--stdin", action="store_true", help="take a prompt from each line of standard input")
    sample.add_argument("--samples", type=_positive, default=4, help="answers to each prompt (default: 4)")
    sample.add_argument("--temperature", type=float, help="0: the likeliest tokens (default: the recipe's)")
    sample.add_argument("--top-p", type=float, help="nucleus sampling (default: the recipe's)")
    sample.add_argument("--max-tokens", type=int, help="longest answer (default: the recipe's)")
    sample.add_argument("--seed", type=_count, default=0, help="another seed, other answers (default: 0)")
    sample.add_argument("--raw", action="store_true", help="the prompt as it is, without the stage's template")
    sample.add_argument("--step", type=_count, help="the checkpoint of this step instead of the finished model")
    export = command("export", "Copy a stage's model into a folder of its own, with a card, ready to be served.", place)
    export.add_argument("run", metavar="RUN", help=run)
    export.add_argument("stage", metavar="STAGE", help=f"{stage}: of a kind that hands over a model")
    export.add_argument("target", metavar="TARGET", help="a folder that does not exist yet, or is empty")
    export.add_argument("--merge", action="store_true", help="merge the model's adapter into its weights, in float32")
    gc = command("gc", "Make room: remove what no run needs. It shows what, and asks.", place)
    gc.add_argument("--dry-run", action="store_true", help="only show it")
    gc.add_argument("--yes", action="store_true", help="do not ask")
    gc.add_argument("--older-than", metavar="AGE", type=_age, default=0.0, help="only what has not changed for 7d, 12h, 30m")
    gc.add_argument("--checkpoints", action="store_true", help="also checkpoints of finished stages")
    gc.add_argument("--failed", action="store_true", help="also failed runs, and what they alone need")
    gc.add_argument("--run", metavar="RUN", action="append", default=[], help="also this run and what it alone needs")
    pin = command("pin", "Keep a run or a stage folder from `r1 gc`; without a name: list what is kept.", place)
    pin.add_argument("name", metavar="NAME", nargs="?", help="a run's name, `latest`, or a stage folder")
    unpin = command("unpin", "Let `r1 gc` have it again.", place)
    unpin.add_argument("name", metavar="NAME", help="a run's name, `latest`, or a stage folder")
    doctor = command("doctor", "What works on this machine, and whether it has what a recipe asks for.", place, code)
    doctor.add_argument("config", metavar="CONFIG", nargs="?", help="a recipe")
    doctor.add_argument("--set", metavar="KEY=VALUE", dest="overrides", action="append", default=[], help="override a key")
    doctor.add_argument("--network", action="store_true", help="also ask the hub for what the recipe names")
    completion = command("completion", "Print what makes a shell complete commands, options, recipes, runs and stages.")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))


def _count(text: str) -> int:
    if (value := int(text)) < 0:
        raise ValueError(text)
    return value


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


def _age(text: str) -> float:
    """Seconds of `7d`, `12h`, `30m`; a bare number is days."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([dhm]?)", text)
    if found is None:
        raise ValueError(text)
    return float(found[1]) * {"": 86400, "d": 86400, "h": 3600, "m": 60}[found[2]]
