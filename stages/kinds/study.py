"""`study`: variants of a stage over seeds, compared: table, figures, and a verdict for each claim.

A recipe with a section `study:` becomes its arms and this last stage (stages/studies/expand.py). Its report: `summary.json` and
`study.md` (results, slopes and verdicts), `learning.png`, `final.png`, `slopes-1.png` where claims ask for slopes; and apart
from them, because they are other ones on another day, `costs.json` and `costs.md` (seconds and memory). What is said about
seeds is said about chance in the varied stage alone: all arms start from one model and are measured on the same problems.
"""

from typing import Any, Literal

from pydantic import Field

from stages.contract.config import Config, ModelRef, ReportRef, StageConfig
from stages.kinds.summary import COUNTS, HEADLINE
from stages.store.files import whole_folder, write_bytes, write_json
from stages.store.stage import Result, StageContext, StageKind
from stages.studies.arms import COSTS, Arm, read_arm, read_metrics
from stages.studies.claims import Verdict, judge
from stages.studies.settings import Comparison, Slopes
from stages.studies.slopes import equal_kl_table, slopes_table
from stages.studies.text import by_variant, costs_table, results_table, sentence, spreads


class ArmInputs(Config):
    """What there is of an arm."""

    variant: str
    """Its variant."""
    seed: int
    """Its seed."""
    trained: ModelRef
    """The stage that was varied; beside its model lie its journal and manifest."""
    report: ReportRef
    """The evaluation of that model."""
    start: ReportRef
    """The evaluation of the model that it started from."""


class StudyConfig(StageConfig):
    """Arms and claims, as they come out of a recipe's section `study:`."""

    kind: Literal["study"]
    """This kind."""
    arms: dict[str, ArmInputs] = Field(min_length=1)
    """Name -> arm."""
    variants: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Variant -> its levels by factor, in the order in which they are shown."""
    claims: dict[str, Comparison] = Field(default_factory=dict)
    """Name -> claim."""
    left_out: tuple[str, ...] = ()
    """Claims that need variants which were left out."""
    slopes: tuple[Slopes, ...] = ()
    """What the claims take slopes against; of each a table and a figure are made."""


def run(context: StageContext[StudyConfig]) -> Result:
    """Read the arms and compare them."""
    from stages.studies.figures import against, facets, final, learning

    config, folders = context.config, context.inputs
    starts = {a.start.removesuffix("-eval"): folders[f"arms.{name}.start"] for name, a in config.arms.items()}
    bases = {label: read_metrics(folder) for label, folder in starts.items()}
    arms = []
    for name, given in config.arms.items():
        trained, report = folders[f"arms.{name}.trained"], folders[f"arms.{name}.report"]
        arms.append(read_arm(given.variant, given.seed, given.start.removesuffix("-eval"), trained, report))
    verdicts = judge(config.claims, arms, bases)
    tested = sum(verdict.holm is not None for verdict in verdicts)
    said = {verdict.name: sentence(verdict, tested) for verdict in verdicts}
    left_out = [f"left out, for it needs variants that were left out: {name}" for name in config.left_out]
    models = {label: _row(metrics) for label, metrics in bases.items()} | _rows(arms)
    document = {
        "models": models,
        "variants": spreads(arms),
        "starts": bases,
        "seeds": sorted({arm.seed for arm in arms}),
        "claims": [_claim(verdict, said[verdict.name]) for verdict in verdicts],
        "claims_left_out": list(config.left_out),
    }
    costs = {metric: {name: vars(one) for name, one in by_variant(arms, metric).items()} for metric in COSTS}
    tables = results_table(arms, bases), costs_table(arms)
    slopes = {f"slopes-{number}.png": one for number, one in enumerate(config.slopes, 1)}
    tabled = [make(one, arms, config.variants) for one in slopes.values() for make in (slopes_table, equal_kl_table)]
    sloping = [table for table in tabled if table]
    with whole_folder(context.folder.output("report")) as report:
        write_json(report / "summary.json", document)
        write_json(report / "costs.json", costs)
        write_bytes(report / "study.md", _page(tables[0], sloping, [*said.values(), *left_out], list(slopes), arms).encode())
        write_bytes(report / "costs.md", tables[1].encode())
        write_bytes(report / "learning.png", learning(arms, facets(config.variants)))
        write_bytes(report / "final.png", final(arms, bases))
        for name, one in slopes.items():
            write_bytes(report / name, against(one, arms, config.variants, bases))
    numbers = {f"{label}/{key}": value for label, row in models.items() for key, value in row.items() if value is not None}
    return Result(metrics=numbers, notes={"verdicts": said}, remarks=[*said.values(), *left_out])


def _row(metrics: dict[str, float]) -> dict[str, float | None]:
    """The headline numbers of a model, as `summary` has them."""
    row = {key: metrics.get(key) for key in HEADLINE}
    return {key: int(value) if key in COUNTS and value is not None else value for key, value in row.items()}


def _rows(arms: list[Arm]) -> dict[str, dict[str, float | None]]:
    """Variant -> the means of its seeds' headline numbers; the error is over seeds, of a single seed over problems."""
    rows = {}
    for variant in dict.fromkeys(arm.variant for arm in arms):
        own = [arm for arm in arms if arm.variant == variant]
        row = _row({key: found[variant].mean for key in HEADLINE if variant in (found := by_variant(own, key))})
        accuracy = by_variant(own, "accuracy")[variant]
        if accuracy.sd is not None:
            row["accuracy_stderr"] = accuracy.sd / accuracy.n**0.5
        rows[variant] = row
    return rows


def _claim(verdict: Verdict, said: str) -> dict[str, Any]:
    spread = {
        key: vars(value) if value else None for key, value in vars(verdict).items() if key in ("of", "than", "difference")
    }
    facts = {"name": verdict.name, "claim": verdict.claim.says, "metric": verdict.claim.metric, "verdict": verdict.answer}
    return {**facts, **spread, "holm": verdict.holm, "sentence": said}


def _page(table: str, sloping: list[str], said: list[str], figures: list[str], arms: list[Arm]) -> str:
    seeds, some = len({arm.seed for arm in arms}), arms[0].metrics
    over = "One seed" if seeds == 1 else f"Means over {seeds} seeds ± half of their 95 % interval (t-distribution)"
    problems = f"{some.get('problems', 0):.0f} held-out problems × {some.get('samples', 0):.0f} samples"
    lines = [table, f"{over}; {problems}.", "", *sloping, *(f"- {text}" for text in said)]
    shown = {"learning.png": "learning curves", "final.png": "final results", **dict.fromkeys(figures, "slopes")}
    return "\n".join([*lines, *(f"\n![{what}]({name})" for name, what in shown.items()), ""])


KIND = StageKind(name="study", version=2, config=StudyConfig, output="report", run=run)
