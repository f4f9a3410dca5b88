"""A recipe with a section `study:` -> an ordinary recipe: an arm for every variant and seed, and a stage that compares them."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from stages.contract.errors import UserError
from stages.contract.suggest import nearest
from stages.studies.settings import START, Chosen, Claim, Comparison, Quantity, Settings, Slopes, Study

Merge = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
Where = Callable[..., str]
"""Keys of the document -> file and dotted key."""
STUDY = "study"
"""The section, and the name of the last stage."""


class Variants:
    """The variants of a study by name: the sections of their stages, and their levels of the factors."""

    def __init__(self, study: Study, base: dict[str, Any], where: Where, merge: Merge) -> None:
        """`base`: the section that is varied. Raises UserError when two variants have one name, or `only` names others."""
        self.factors, self._where, self._merge = study.factors, where, merge
        self.sections = {name: merge(base, nested(given, merge)) for name, given in study.variants.items()}
        self.levels: dict[str, dict[str, str]] = {name: {} for name in study.variants}
        for levels in itertools.product(*study.factors.values()) if study.factors else ():
            name = "-".join(levels)
            if name in self.sections:
                raise UserError(f"two variants are called `{name}`", where=where(STUDY), mend="rename one")
            self.levels[name] = dict(zip(study.factors, levels, strict=True))
            self.sections[name] = base
            for factor, level in self.levels[name].items():
                self.sections[name] = merge(self.sections[name], nested(study.factors[factor][level], merge))
        for name in study.only:
            self._known(name, (STUDY, "only"))
        self.names = [name for name in self.sections if not study.only or name in study.only]

    def chosen(self, chosen: Chosen, key: tuple[str, ...]) -> list[str]:
        """Names of the variants that a claim means, also of such that `only` leaves out. Raises UserError for unknown ones."""
        if not isinstance(chosen, dict):
            names = [chosen] if isinstance(chosen, str) else list(chosen)
            return [self._known(name, key) for name in names]
        wanted = {factor: {levels} if isinstance(levels, str) else set(levels) for factor, levels in chosen.items()}
        for factor, levels in wanted.items():
            if factor not in self.factors:
                raise UserError(f"no factor `{factor}`", where=self._where(*key), mend=nearest(factor, self.factors))
            for level in levels - self.factors[factor].keys():
                mend = nearest(level, self.factors[factor])
                raise UserError(f"factor `{factor}` has no level `{level}`", where=self._where(*key), mend=mend)
        made = {name: levels for name, levels in self.levels.items() if levels}
        return [name for name, has in made.items() if all(has[factor] in levels for factor, levels in wanted.items())]

    def _known(self, name: str, key: tuple[str, ...]) -> str:
        if name not in self.sections:
            raise UserError(f"no variant `{name}`", where=self._where(*key), mend=nearest(name, self.sections))
        return name

    def blocks(self, names: list[str], slope: str) -> list[list[str]]:
        """The variants parted by their levels of all factors but those that set `slope`."""

        def sets(factor: str) -> bool:
            return any(_value(nested(given, self._merge), slope) is not None for given in self.factors[factor].values())

        others = [factor for factor in self.factors if not sets(factor)]
        found: dict[tuple[str | None, ...], list[str]] = {}
        for name in names:
            found.setdefault(tuple(self.levels[name].get(factor) for factor in others), []).append(name)
        return list(found.values())


def nested(settings: Settings, merge: Merge) -> dict[str, Any]:
    """Dotted keys as nested ones.

    >>> nested({"critic.lam": 0.95, "kl": 0}, lambda below, above: {**below, **above})
    {'critic': {'lam': 0.95}, 'kl': 0}
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        below: Any = value
        for part in reversed(str(key).split(".")):
            below = {part: below}
        found = merge(found, below)
    return found


def expanded(study: Study, document: dict[str, Any], merge: Merge, where: Where) -> dict[str, Any]:
    """The recipe: its stages, for every seed and variant an arm and its evaluation, and a last stage that compares them.

    The recipe's own stages stay, for others may need them; the caller leaves out what the last stage does not need. Seeds come
    first: a study that is interrupted has as many whole rounds as possible. Raises UserError for names that do not exist.
    """
    stages: dict[str, Any] = dict(document.get("stages") or {})
    base = _section(stages, study.stage, where, "stage")
    protocol = dict(_section(stages, study.evaluation, where, "evaluation"))
    if protocol.get("kind") != "evaluate":
        raise UserError(f"`{study.evaluation}` is not of kind evaluate", where=where(STUDY, "evaluation"), mend="name another")
    protocol = {**protocol, "kind": "evaluate_model"}
    protocol.pop("models", None)
    if STUDY in stages:
        raise UserError(f"a stage is called `{STUDY}`", where=where("stages", STUDY), mend="rename it")
    variants = Variants(study, base, where, merge)
    evaluations = _Evaluations(stages, protocol, study.follow)
    arms: dict[str, dict[str, Any]] = {}
    for seed, name in itertools.product(study.seeds, variants.names):
        arm, section = f"{name}-s{seed}", {**variants.sections[name], "seed": seed}
        start = section.get("policy", section.get("model"))
        if arm in stages:
            raise UserError(f"`{arm}` is both an arm and a stage", where=where("stages", arm), mend="rename the variant")
        report = evaluations.of(str(start), section)
        stages[arm] = section
        arms[arm] = {"variant": name, "seed": seed, "trained": arm, "report": evaluations.of(arm, section), "start": report}
    claims = dict(_comparisons(study, variants, where))
    levels = {name: variants.levels[name] for name in variants.names}
    stages[STUDY] = {
        "kind": STUDY,
        "arms": arms,
        "variants": levels,
        "claims": {name: claim.model_dump(mode="json") for name, claim in claims.items() if claim is not None},
        "left_out": [name for name, claim in claims.items() if claim is None],
        "slopes": [found.model_dump(mode="json") for found in _slopes(study, variants)],
    }
    return {**document, "stages": stages}


def _section(stages: dict[str, Any], name: str, where: Where, key: str) -> dict[str, Any]:
    if not isinstance(section := stages.get(name), dict):
        raise UserError(f"no stage `{name}`", where=where(STUDY, key), mend=nearest(name, stages))
    return section


class _Evaluations:
    """The evaluation of each model under each protocol, made once."""

    def __init__(self, stages: dict[str, Any], protocol: dict[str, Any], follow: tuple[str, ...]) -> None:
        self._stages, self._protocol, self._follow = stages, protocol, follow

    def of(self, model: str, section: dict[str, Any]) -> str:
        """Name of the stage that evaluates `model` as the arm with this `section` is."""
        followed = {field: section[field] for field in self._follow if field in section}
        wanted = {**self._protocol, **followed, "model": model}
        for number in itertools.count(1):
            name = f"{model}-eval" + (str(number) if number > 1 else "")
            if self._stages.setdefault(name, wanted) == wanted:
                return name
        raise AssertionError


def _comparisons(study: Study, variants: Variants, where: Where) -> Iterator[tuple[str, Comparison | None]]:
    """Each claim with its variants; None where `only` leaves out some that it needs."""
    for name, claim in study.claims.items():
        direction, other = ("above", claim.above) if claim.above is not None else ("below", claim.below)
        of = _quantity(claim, claim.of, variants, where, (STUDY, "claims", name, "of"))
        than: Any = other
        if isinstance(other, str | tuple | dict) and other != START:
            than = _quantity(claim, other, variants, where, (STUDY, "claims", name, direction))
        needed = {v for q in (of, than) if isinstance(q, Quantity) for block in q.blocks for v in block}
        facts = {"says": claim.says, "metric": claim.metric, "of": of, "than": than, "direction": direction}
        yield name, Comparison.model_validate(facts) if needed <= set(variants.names) else None


def _slopes(study: Study, variants: Variants) -> Iterator[Slopes]:
    """For each setting that claims take slopes against: all combinations of the other factors, whether or not a claim asks."""
    for against, log in dict.fromkeys((claim.slope, claim.log) for claim in study.claims.values()):
        if against is None:
            continue
        values = {name: _value(variants.sections[name], against) for name in variants.names if variants.levels[name]}
        x = {name: math.log10(value) if log else float(value) for name, value in values.items() if _on_axis(value, log=log)}
        blocks = [block for block in variants.blocks(list(x), against) if len({x[variant] for variant in block}) > 1]
        if blocks:
            yield Slopes(against=against, log=log, x=x, blocks=tuple(map(tuple, blocks)))


def _on_axis(value: Any, *, log: bool) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and (value > 0 or not log)


def _quantity(claim: Claim, chosen: Chosen, variants: Variants, where: Where, key: tuple[str, ...]) -> Quantity:
    names, words = variants.chosen(chosen, key), _words(chosen)
    if claim.slope is None:
        return Quantity(blocks=(tuple(names),), words=words)
    blocks = variants.blocks(names, claim.slope)
    x = {name: _number(variants.sections[name], claim.slope, name, where(*key[:3]), log=claim.log) for name in names}
    for block in blocks:
        if len({x[variant] for variant in block}) < 2:
            what = f"no slope against `{claim.slope}`: {', '.join(block)} have one value of it"
            raise UserError(what, where=where(*key), mend="choose variants that differ in it")
    against = f"log10 {claim.slope}" if claim.log else claim.slope
    return Quantity(blocks=tuple(map(tuple, blocks)), x=x, words=f"slope against {against} of {words}")


def _number(section: dict[str, Any], key: str, variant: str, where: str, *, log: bool) -> float:
    value = _value(section, key)
    if not _on_axis(value, log=False):
        what = f"variant `{variant}` does not say a number for `{key}`"
        raise UserError(what, where=where, mend="write it in the variant, or in the stage")
    if log and value <= 0:
        raise UserError(f"variant `{variant}` has `{key}` {value:g}, which has no logarithm", where=where, mend="drop `log`")
    return math.log10(value) if log else float(value)


def _value(section: Any, key: str) -> Any:
    """What stands under a dotted key; None where nothing does."""
    for part in key.split("."):
        section = section.get(part) if isinstance(section, dict) else None
    return section


def _words(chosen: Chosen) -> str:
    if isinstance(chosen, str):
        return chosen
    if isinstance(chosen, tuple):
        return ", ".join(chosen)
    parts = [f"{factor} {levels if isinstance(levels, str) else ' or '.join(levels)}" for factor, levels in chosen.items()]
    return ", ".join(parts) or "all combinations"
