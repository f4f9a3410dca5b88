"""How many problems, documents and tokens a stage will have: counted where that can be, else assumed, and so said."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.runs.stage_record import Finished
from stages.contract.config import stage_inputs
from stages.recipe.resolve import ResolvedRecipe
from stages.tracking.journal import read

HUB_ROWS = {("openai/gsm8k", "train"): 7473, ("openai/gsm8k", "test"): 1319, ("HuggingFaceH4/MATH-500", "test"): 500}
"""Rows of well-known datasets; the hub is not asked."""
UNKNOWN_ROWS = 10_000
QUESTION_TOKENS = 80
"""Of a question in words."""
TOY_QUESTION, TOY_DOCUMENT = 10, 35
"""Tokens of the toy's questions and documents."""
CHARACTERS = 4
"""Of a token of a template's text."""
LENGTH_SHARE = 0.25
"""Mean answer as a share of `max_tokens`, where nothing is known of it."""
KEPT_SHARE = 0.5
"""Of the problems of a curation, how many have an answer that is kept."""
MEASURED = ("rollout/length", "rollout/mean_length", "eval/length")


@dataclass
class Counts:
    """Counts for a recipe's stages. What was assumed on the way is in `assumptions`."""

    recipe: ResolvedRecipe
    finished: Mapping[str, Finished]
    length: float | None = None
    """Mean answer in tokens, the user's; None: measured or assumed."""
    assumptions: dict[str, None] = field(default_factory=dict)

    def assume(self, text: str) -> None:
        """Remember a sentence, once."""
        self.assumptions[text] = None

    def answer_tokens(self, name: str, config: Any) -> float:
        """Mean length of the answers that a stage samples."""
        limit = float(config.sampling.max_tokens)
        if self.length is not None:
            self.assume(f"answers have {self.length:g} tokens on average (--length)")
            return min(self.length, limit)
        if (known := self._measured(name)) is not None:
            source, tokens = known
            self.assume(f"answers of {name} are as long as in {source}: {tokens:.0f} tokens on average (measured)")
            return min(tokens, limit)
        self.assume(f"answers have {LENGTH_SHARE:.0%} of `max_tokens` on average: set --length to what you expect")
        return max(1.0, LENGTH_SHARE * limit)

    def _measured(self, name: str) -> tuple[str, float] | None:
        """The last mean length that a finished stage before this one has in its journal, the nearest first."""
        waiting, seen = [name], set[str]()
        while waiting:
            current = waiting.pop(0)
            if current in self.finished:
                for line in reversed(read(self.finished[current].folder.journal)):
                    for metric in MEASURED:
                        if metric in line.metrics:
                            return current, line.metrics[metric]
            for source, _ in stage_inputs(self.recipe.stages[current]).values():
                if source not in seen:
                    seen.add(source)
                    waiting.append(source)
        return None

    def prompt_tokens(self, config: Any, source: Any) -> int:
        """Of a prompt: template and question."""
        toy = getattr(source, "source", "") == "toy"
        if toy and config.template.name == "question":
            return TOY_QUESTION
        rendered = len(config.template.render("")) // CHARACTERS
        question = TOY_QUESTION if toy else QUESTION_TOKENS
        self.assume(f"a question has {QUESTION_TOKENS} tokens; {CHARACTERS} characters of a template are a token")
        return rendered + question

    def problems(self, source: Any) -> int:
        """Of a source of problems."""
        if source.source == "toy" or getattr(source, "count", None):
            return int(source.count)
        if source.source == "mixture":
            return sum(self.problems(part.problems) for part in source.parts)
        rows = self._rows(source)
        rows = max(0, rows - getattr(source, "offset", 0))
        return min(rows, source.limit) if getattr(source, "limit", None) else rows

    def _rows(self, source: Any) -> int:
        if source.source == "file" and Path(source.path).suffix in (".jsonl", ".csv"):
            with Path(source.path).open("rb") as file:
                return sum(1 for line in file if line.strip())
        known = HUB_ROWS.get((getattr(source, "name", ""), getattr(source, "split", "")))
        if known is None:
            self.assume(f"a dataset whose rows cannot be counted here has {UNKNOWN_ROWS:,}")
        return known or UNKNOWN_ROWS

    def documents(self, names: tuple[str, ...]) -> tuple[float, float, float]:
        """Number, mean prompt and mean answer, in tokens, of the documents of these stages together."""
        parts = [self._documents(name) for name in names]
        total = sum(count for count, _, _ in parts)
        prompt, answer = (sum(part[0] * part[place] for part in parts) / max(1.0, total) for place in (1, 2))
        return total, prompt, answer

    def _documents(self, name: str) -> tuple[float, float, float]:
        config: Any = self.recipe.stages[name]
        manifest = self.finished[name].manifest if name in self.finished else None
        if config.kind == "dataset":
            rows = manifest.metrics.get("documents") if manifest else None
            count = rows or float(min(_lines(config.path), config.limit or 10**12))
            characters = Path(config.path).stat().st_size / max(1.0, count)
            self.assume("of a document in a file a third is read and two thirds are learned")
            return count, characters / CHARACTERS / 3, characters / CHARACTERS * 2 / 3
        prompt = self.prompt_tokens(config, config.problems)
        if manifest and "kept" in manifest.metrics:
            return manifest.metrics["kept"], prompt, manifest.metrics.get("mean_kept_tokens", 0.0)
        asked = min(self.problems(config.problems), config.count or 10**12)
        self.assume(f"curation keeps answers to {KEPT_SHARE:.0%} of its problems")
        return asked * KEPT_SHARE * config.per_problem, prompt, self.answer_tokens(name, config)


def _lines(path: str) -> int:
    if Path(path).suffix == ".parquet":
        import pyarrow.parquet as pq

        return int(pq.ParquetFile(path).metadata.num_rows)
    with Path(path).open("rb") as file:
        return sum(1 for line in file if line.strip())
