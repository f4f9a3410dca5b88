"""Cold-start data and rejection sampling: sample a model, keep what is correct and readable (DeepSeek-R1, section 2.3).

The paper samples R1-Zero at temperature 1, keeps answers that are correct and readable (repetition and language-mix filters),
has them rewritten into a first-person style, and people check the result. All of it is here; what a recipe does not ask for
(worked examples, near-duplicates, rewriting, review) is left out, so by default the data stay the model's own words. Rejection
sampling from a later model (section 2.3.3) is the same stage with another `sampler`.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from stages.contract.errors import UserError
from stages.curation.choose import CHOSEN, DUPLICATE, SURPLUS, Selection
from stages.curation.dataset import DatasetWriter, Kept, Rows, dataset_writer
from stages.curation.duplicates import Finder
from stages.curation.few_shot import load_examples
from stages.curation.review import read_verdicts, review_id, review_needed, review_path, write_review
from stages.curation.rewrite import REFUSED, Rewriting
from stages.curation.sampled import Sampled
from stages.curation.settings import CurateConfig
from stages.evals.contamination import decontaminated
from stages.problems.sources import load_problem_set, verifiers_asked
from stages.problems.templates import Template
from stages.rewards.answers.verifiers import used
from stages.store.files import whole_folder, write_json
from stages.store.stage import Result, StageContext, StageKind

KEPT, REJECTED, REWRITTEN = "kept", "rejected", "rewritten"
__all__ = ["KIND", "CurateConfig", "run"]


def run(context: StageContext[CurateConfig]) -> Result:
    """Sample chunk by chunk, choose, have the chosen rewritten and reviewed where that is asked for, and write the dataset.

    Raises UserError when nothing is left, and while verdicts of a review are missing.
    """
    config = context.config
    template = _template(config)
    judged = config.rewards.remarks(used(verifiers_asked(config.problems), config.rewards.verifier))
    if config.rewrite is not None:
        config.rewrite.endpoint.key()  # before anything is sampled
    source = load_problem_set(config.problems, "problems")
    asked = {example.question for example in template.examples}
    cleaned = decontaminated(config, source.problems, examples=template.examples)
    taken = cleaned.problems[: config.count]
    problems = [p for p in taken if config.few_shot is None or p.question not in asked]
    sampled = Sampled(context, problems, template, passes=1 if config.rewrite is None else 2)
    sampled.sample()
    selection = Selection()
    finder = None if config.duplicates is None else Finder(config.duplicates, context.folder.rollouts)
    selection.choose(sampled, config, finder, context.stop.check)
    chosen = _Chosen(context, sampled, selection)
    chosen.rewrite()
    chosen.send_out()
    with whole_folder(context.folder.output("dataset")) as folder:
        with dataset_writer(folder / "train.parquet", Rows(config, config.template, context.input_digests)) as writer:
            chosen.write(writer)
        chosen.demand_some()
        report = _report(selection, chosen, config) | {"problems_refused": source.refused}
        write_json(folder / "report.json", report)
    metrics = {name: value for name, value in report.items() if isinstance(value, float)}
    notes = {
        "failed_first": report["failed_first"],
        "answers": _ordered(chosen.fates, config),
        "problems": source.report() | {"decontaminated": cleaned.report()},
    }
    checked, warnings = sampled.check()
    remarks = [*judged, *source.remarks("problems"), *cleaned.remarks("problems"), *warnings]
    if left_out := len(taken) - len(problems):
        remarks.append(f"few_shot: {left_out} problems are worked examples and were left out")
    return Result(metrics=metrics | checked, notes=notes, remarks=remarks, tokens=selection.tokens)


def _template(config: CurateConfig) -> Template:
    """The template that is sampled with: the worked examples of the file come after the recipe's own."""
    if config.few_shot is None:
        return config.template
    return config.template.model_copy(update={"examples": (*config.template.examples, *load_examples(config.few_shot))})


class _Chosen:
    """The chosen answers, chunk by chunk: as they were sampled, or as they were rewritten."""

    def __init__(self, context: StageContext[CurateConfig], sampled: Sampled, selection: Selection) -> None:
        config = context.config
        self._config, self._sampled, self._places, self._stop = config, sampled, selection.places, context.stop
        self.fates: Counter[str] = Counter(selection.fates)
        """What became of every sampled answer; it is complete once the dataset is written."""
        self.problems_kept = 0
        """How many problems have an answer in the dataset."""
        self._review = review_path(context.folder.path / "review", config.review_file)
        self._rewriting = None
        if config.rewrite is not None:
            located = config.rewards.located(context.inputs)
            self._rewriting = Rewriting(config.rewrite, context.folder, context.stop, config.filters, located)

    def _kept(self, number: int) -> list[tuple[Kept, str | None]]:
        """The chosen answers of a chunk, each with what it fails once it is rewritten, if it is."""
        groups = self._sampled.groups(number)
        episodes = [groups[group].episodes[place] for group, place in self._places[number]]
        if self._rewriting is None:
            return [(Kept(episode), None) for episode in episodes]
        return [(Kept(r.episode, r.model), r.failure) for r in self._rewriting.rewrite(episodes)]

    def _all(self) -> Iterator[Kept]:
        for number in range(len(self._places)):
            self._stop.check()
            yield from (kept for kept, failure in self._kept(number) if failure is None)

    def rewrite(self) -> None:
        """Have every chunk rewritten and judged."""
        if self._rewriting is None:
            return
        for number in range(len(self._places)):
            self._stop.check()
            failures = [failure for _, failure in self._kept(number)]
            self.fates.update(f"{REWRITTEN}/{failure}" for failure in failures if failure is not None)
            self.fates[CHOSEN] -= sum(failure is not None for failure in failures)
            good = sum(failure is None for failure in failures)
            metrics = {"curate/rewritten": float(len(failures)), "curate/rewritten_right": float(good)}
            self._sampled.tell(len(self._places) + number + 1, metrics)

    def send_out(self) -> None:
        """Write the review's file, if a review is asked for and there is none yet.

        Raises UserError, which says what to do, when it was written.
        """
        if self._config.review == "none" or self._review.exists():
            return
        self.demand_some(CHOSEN)
        rows = (
            {
                "id": _id(kept),
                "problem_id": kept.episode.problem.id,
                "question": kept.episode.problem.question,
                "reference": kept.episode.problem.answer,
                "answer": kept.episode.text,
            }
            for kept in self._all()
        )
        count = write_review(self._review, rows)
        raise review_needed(self._review, count, count)

    def write(self, writer: DatasetWriter) -> None:
        """Write what is kept in the end.

        Raises UserError while verdicts are missing.
        """
        verdicts = None if self._config.review == "none" else read_verdicts(self._review)
        seen: set[str] = set()
        missing, last = 0, None
        for kept in self._all():
            verdict: bool | None = True
            if verdicts is not None:
                seen.add(_id(kept))
                verdict = verdicts.get(_id(kept))
                missing += verdict is None
            if verdict is True:
                writer.add(kept)
                self.problems_kept += kept.episode.problem.id != last
                last = kept.episode.problem.id
            self.fates[KEPT if verdict else REJECTED] += 1
        del self.fates[CHOSEN]
        if strange := sorted((verdicts or {}).keys() - seen):
            what = f"there is no answer with the id `{strange[0]}`"
            raise UserError(what, where=str(self._review), mend="put the ids back as they were written")
        if missing:
            raise review_needed(self._review, missing, len(seen))

    def demand_some(self, fate: str = KEPT) -> None:
        """Raises UserError when no answer has come so far."""
        if self.fates[fate]:
            return
        fates = {name: number for name, number in self.fates.items() if number and name not in (CHOSEN, KEPT)}
        shown = ", ".join(f"{number} × {name}" for name, number in _ordered(Counter(fates), self._config).items() if number)
        what = f"no answer of {sum(fates.values())} passes the filters (failed: {shown})"
        raise UserError(what, where="filters", mend="train the sampler longer, take more problems, or loosen the filters")


def _id(kept: Kept) -> str:
    return review_id(kept.episode.problem.id, kept.episode.sample, kept.episode.text)


def _ordered(fates: Counter[str], config: CurateConfig) -> dict[str, int]:
    """How many answers had each fate that the recipe makes possible; they add up to what was sampled."""
    names = [*config.filters.names, *([DUPLICATE] if config.duplicates else []), SURPLUS]
    if config.rewrite is not None:
        names += [f"{REWRITTEN}/{name}" for name in (REFUSED, *config.filters.names)]
    return {name: fates[name] for name in [*names, *([REJECTED] if config.review == "required" else []), KEPT]}


def _report(selection: Selection, chosen: _Chosen, config: CurateConfig) -> dict[str, Any]:
    """Headline numbers, and what answers failed. The whole account is given where it says more than that."""
    fates = chosen.fates
    failed = {name: fates[name] for name in config.filters.names}
    report: dict[str, Any] = {
        "problems": float(selection.problems),
        "sampled": float(selection.sampled),
        "kept": float(fates[KEPT]),
        "kept_share": chosen.problems_kept / selection.problems,
        "correct_share": selection.right / selection.sampled,
        "passed_share": 1 - sum(failed.values()) / selection.sampled,
        "mean_kept_tokens": selection.chosen_tokens / selection.fates[CHOSEN],
        "failed_first": failed,
    }
    plain = config.duplicates is None and config.rewrite is None and config.review == "none" and config.per_problem == 1
    return report if plain else report | {"answers": _ordered(fates, config)}


KIND = StageKind(name="curate", version=2, config=CurateConfig, output="dataset", run=run)
