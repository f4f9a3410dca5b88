"""The whole reading path of sampled texts, in batches: tokens, decoding, rewards, metrics, records, terminal, page, MLflow.

`python -m tests.untrusted.reading_path 500000` sends that many generated texts through it and prints count, time and the
slowest batch; an exception ends it with the seed of its batch. `--seed` and `--only` repeat a part of it.
"""

import argparse
import io
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.problems.episode import Episode, Group, Problem
from tests.untrusted.calls import CHAIN
from tests.untrusted.texts import framed, random_text

BATCH = 1000
"""Texts that are scored, recorded and shown together."""
SAMPLES = 8
"""Texts of a problem."""
POOL_SHARE = 0.005
"""Share of the texts that math-verify's processes are asked about; the others are judged without a process."""
RIGHT_SHARE = 0.5
"""Share of the problems that have a right answer among their texts."""
SHOWN_SHARE = 0.02
"""Share of the texts that are also drawn as panels and curated."""
BATCH_LIMIT_S = 120.0
"""Seconds of processor time for a batch; a hang would take longer than this."""
REFERENCES = ("5", "1/2", "42", "1,000.99", "x+1", "-7", r"\frac{1}{2}", "0.1", "June 20", "(1,2]")
CHEAP = ("numeric", "exact")


@dataclass
class Tally:
    """What went through."""

    texts: int = 0
    characters: int = 0
    pooled: int = 0
    seconds: float = 0.0
    slowest: tuple[float, int] = (0.0, 0)
    """Seconds of the slowest batch, and its seed."""
    slowest_group: tuple[float, int] = (0.0, 0)
    """Seconds in which the texts of a problem were scored, the longest, and their characters."""
    verdicts: dict[str, int] = field(default_factory=dict)


def byte_tokenizer() -> Any:
    """A byte-level tokenizer without merges: every sequence of bytes is one of its 256 tokens, as a policy may sample it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def ids_of(text: str, letters: dict[int, int]) -> list[int]:
    """Tokens of a text's bytes; a lone surrogate becomes three bytes that are no UTF-8, which a policy can sample too."""
    return [letters[byte] for byte in text.encode("utf-8", "surrogatepass")]


def generated(generator: random.Random, tokenizer: Any, letters: dict[int, int], batch: int) -> list[Group]:
    """Groups of episodes: every other text by way of tokens and the decoder, every other as it is, with its surrogates."""
    groups = []
    for number in range(batch // SAMPLES):
        reference = generator.choice(REFERENCES)
        problem = Problem(f"p:{number}", f"What is {reference}?", reference, "s", CHAIN, generator.choice(CHEAP))
        texts = [random_text(generator) for _ in range(SAMPLES)]
        if generator.random() < RIGHT_SHARE:
            texts[0] = framed(random_text(generator).replace("<", ""), reference)
        ids = [ids_of(text, letters) for text in texts]
        decoded = tokenizer.batch_decode(ids)
        group = Group(problem)
        for sample, (text, tokens, again) in enumerate(zip(texts, ids, decoded, strict=True)):
            finish: Any = "length" if generator.random() < 0.05 else "stop"
            group.episodes.append(
                Episode(problem, sample, "q", [1], tokens, [-0.5] * len(tokens), again if sample % 2 else text, finish)
            )
        groups.append(group)
    return groups


def send(groups: list[Group], generator: random.Random, folder: Path, tally: Tally, pool_share: float = POOL_SHARE) -> None:
    """Send one batch through everything that reads it, and check what can be checked at once."""
    from flows.cli.rollouts import _lines, _panels
    from flows.output import printable_json
    from flows.runs.answers import rows_of
    from stages.curation.duplicates import grams
    from stages.curation.filters import Filters, first_failure
    from stages.evals.headline import answer_metrics, problem_metrics
    from stages.report.text import shown
    from stages.rewards.answers.judges import math
    from stages.rewards.answers.verifiers import Asked
    from stages.rewards.score import score
    from stages.rewards.settings import Rewards
    from stages.rewards.tags import final_answer
    from stages.rl.metrics import held_out_metrics, reward_metrics, rollout_metrics
    from stages.rollout.records import read_groups, write_groups
    from stages.tracking.journal import Journal, read
    from stages.tracking.mlflow.artifacts import sampled_answers
    from stages.tracking.mlflow.client import metrics_of

    episodes = [episode for group in groups for episode in group.episodes]
    for boxed in (False, True):
        rewards = Rewards(
            verifier="numeric",
            answer_in="boxed" if boxed else "tags",
            language=1.0,
            repetition=1.0,
            overlong=1.0,
            overlong_buffer=4,
        )
        for group in groups:
            part = [episode for episode in group.episodes if ("\\boxed" in episode.text) == boxed]
            begun = time.perf_counter()
            score(rewards, part, max_tokens=512, key="k")
            characters = sum(len(episode.text) for episode in part)
            tally.slowest_group = max(tally.slowest_group, (time.perf_counter() - begun, characters))
    rewards = Rewards(language=1.0)
    some = [episode for episode in episodes if generator.random() < pool_share]
    asked = [
        Asked(Problem("m", "", e.problem.answer, ""), final_answer(e.text) or final_answer(e.text, "boxed") or e.text)
        for e in some
    ]
    for verdict in math(asked, rewards) if asked else []:
        tally.verdicts[verdict] = tally.verdicts.get(verdict, 0) + 1
    tally.pooled += len(asked)
    metrics = {**reward_metrics(episodes), **rollout_metrics(groups), **held_out_metrics(groups), **answer_metrics(groups)}
    for group in groups[:5]:
        metrics |= problem_metrics(group, rewards)
    path = folder / "rollouts" / "step-000001.parquet"
    write_groups(path, groups)
    assert read_groups(path) == groups
    Journal(folder / "journal.jsonl", keep_through=0).append(1, 1, metrics)
    line = read(folder / "journal.jsonl")[0]
    assert line.metrics == metrics
    assert len(metrics_of(line)) == len(metrics)
    rows = rows_of(path)
    for text in _lines(rows):
        assert text.isprintable() or all(c.isprintable() or c.isspace() for c in text), ascii(text)[:300]
    assert json.loads(printable_json(json.dumps(rows, ensure_ascii=False))) == rows
    page = _page().render(texts=[shown(episode.text, 2000) for episode in episodes])
    assert "<script" not in page
    page.encode()
    answers = sampled_answers(_StageFolder(folder))
    import pandas as pd

    assert json.loads(pd.DataFrame(answers).to_json(orient="split", index=False))["data"]
    few = [row for row in rows if generator.random() < SHOWN_SHARE]
    from rich.console import Console

    _panels(Console(file=io.StringIO(), width=80), few)
    for episode in (e for e in episodes if generator.random() < SHOWN_SHARE):
        first_failure(episode, Filters(), rewards)
        grams(episode.text, 5)
    for episode in episodes:
        tally.verdicts[episode.scored.verdict] = tally.verdicts.get(episode.scored.verdict, 0) + 1
    tally.texts += len(episodes)
    tally.characters += sum(len(episode.text) for episode in episodes)


def _StageFolder(folder: Path) -> Any:  # noqa: N802
    from stages.store.folders import StageFolder

    return StageFolder(folder)


def _page() -> Any:
    import jinja2

    return jinja2.Environment(autoescape=True).from_string("{% for text in texts %}<p>{{ text }}</p>{% endfor %}")


def run(count: int, seed: int, *, batch: int = BATCH, report: bool = False, pool_share: float = POOL_SHARE) -> Tally:
    """Send at least `count` texts, in batches whose seeds begin at `seed`."""
    tokenizer, tally = byte_tokenizer(), Tally()
    letters = {byte: tokenizer.convert_tokens_to_ids(letter) for byte, letter in byte_letters().items()}
    while tally.texts < count:
        generator = random.Random(f"reading-path-{seed}")
        begun = time.process_time()
        try:
            with tempfile.TemporaryDirectory() as folder:
                send(generated(generator, tokenizer, letters, batch), generator, Path(folder), tally, pool_share)
        except BaseException:
            print(f"the batch of seed {seed} failed", file=sys.stderr, flush=True)
            raise
        taken = time.process_time() - begun
        tally.seconds += taken
        tally.slowest = max(tally.slowest, (taken, seed))
        assert taken < BATCH_LIMIT_S, f"the batch of seed {seed} took {taken:.0f} s"
        seed += 1
        if report and seed % 10 == 0:
            print(f"{tally.texts} texts, {tally.seconds:.0f} s of processor time", flush=True)
    return tally


def byte_letters() -> dict[int, str]:
    """Byte -> the letter by which byte-level tokenizers write it (GPT-2's `bytes_to_unicode`)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + number) for number, byte in enumerate(rest)}


def main() -> int:
    """Send texts, and say what went through."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begun = time.monotonic()
    tally = run(options.count, options.seed, report=True)
    print(
        f"{tally.texts} texts of {tally.characters / tally.texts:.0f} characters in {time.monotonic() - begun:.0f} s "
        f"({tally.seconds:.0f} s of processor time); slowest batch of {BATCH}: {tally.slowest[0]:.1f} s "
        f"(seed {tally.slowest[1]}), "
        f"slowest {SAMPLES} texts scored in {tally.slowest_group[0]:.2f} s ({tally.slowest_group[1]} characters); "
        f"{tally.pooled} by math-verify's processes; verdicts {tally.verdicts}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
