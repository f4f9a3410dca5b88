"""Check a model before it is trained: log-probabilities on the trainer's path against the model's own forward pass.

The own forward is `model(input_ids).logits` of each text alone: no cache, no padding, no packing. Packed texts that see each
other, a head that is not the model's own, positions that shift: all of these show as a difference of more than rounding on a
few short texts. What cannot be packed is trained as rows (scorer.py); what agrees on no path is refused.

Rounding is measured on the model itself: the own forward of a text alone against that of the same text with tokens appended. In
a causal model these change nothing but the order of sums. In float32 and float64 a difference above `CAUSAL` is refused: the
model reads later tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stages.engine import ranks
from stages.engine.deepspeed_engine import Engine
from stages.engine.packed import Packed, Text, TrainingPath, micro_batches, row
from stages.engine.scorer import Scorer, TokenScorer
from stages.engine.windows import text_limit, window
from stages.store.errors import UserError

FLOOR = {torch.float64: 1e-5, torch.float32: 1e-4}
"""Least tolerance in nats by number format; log-probabilities are computed in float32 from float64 logits too."""
FLOOR_16 = 0.02
"""The same for 16-bit formats."""
MULTIPLE = 4.0
"""The tolerance as a multiple of the model's own rounding, where that is more than the floor."""
CAUSAL = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Most nats by which appended tokens may change earlier log-probabilities by rounding."""
CAUSAL_16 = 1.0
"""The same for 16-bit formats."""

Score = Callable[[Packed, bool], Tensor]
"""(N,) log-probabilities of a micro-batch's predicted tokens, on the CPU; by the model's own forward where the flag is set."""

_UNREADABLE = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, UserError)
"""What a model's code raises when it is called in a way that it does not know."""


@dataclass(frozen=True)
class TrainingCheck:
    """On which path a model is trained, and how exactly."""

    path: TrainingPath
    tolerance: float
    """Most nats by which a log-probability may differ from the model's own."""
    differences: dict[str, float]
    """Largest difference from the own forward by path, in nats; a path that was not tried, or could not be, has none."""
    own: list[Tensor] = field(default_factory=list, repr=False)
    """Log-probabilities of each text's completion by the model's own forward."""
    warning: str = ""
    """What the user should know; empty on the path `packed`."""

    @property
    def metrics(self) -> dict[str, float]:
        """For the manifest: the largest difference on the path that is taken."""
        return {"check/trained_logprob_difference": self.differences[self.path], "check/tolerance": self.tolerance}


def training_path(model: Any, texts: Sequence[Text]) -> TrainingPath:
    """The path on which a plain model (without DeepSpeed) computes its own log-probabilities of `texts` (see `check_texts`).

    Raises UserError when there is none.
    """
    return check_scorer(TokenScorer(model), texts).path


def check_scorer(scorer: TokenScorer, texts: Sequence[Text]) -> TrainingCheck:
    """As `check_engine`, of a scorer without DeepSpeed. It is left ready for the path that is found."""
    was_training = scorer.training
    scorer.eval()
    probe(scorer)

    def score(packed: Packed, own: bool) -> Tensor:
        logp: Tensor = scorer(packed, own=own)[0].cpu()
        return logp

    with torch.no_grad():
        found = _decided(scorer, score, texts, lambda difference: difference)
    scorer.train(was_training)
    return found


def check_engine(engine: Engine, texts: Sequence[Text]) -> TrainingCheck:
    """Compare the engine's log-probabilities with the model's own, and set the engine's path. Every rank calls it.

    Nothing is changed but the path: no gradient, no random number, no state of the optimizer. Ranks may have different texts,
    but equally many.
    Raises UserError when the model's own forward depends on later tokens, or no path agrees with it.
    """
    with torch.no_grad():
        found = _decided(engine.scorer, lambda packed, own: engine.score(packed, own=own)[0].cpu(), texts, _of_all_ranks)
    engine.path = found.path
    return found


def _of_all_ranks(difference: float) -> float:
    return max(ranks.gather(difference))


def probe(scorer: Scorer) -> None:
    """Find out how the model can be called at all, and note it in the scorer: before DeepSpeed cuts the weights.

    Raises UserError when its own forward fails.
    """
    text, device = Text([1, 2, 0], [1, 2, 0, 1]), next(scorer.model.parameters()).device
    packed, alone = (x.to(device) for x in (micro_batches([text, Text([1, 2, 0], [2, 1])], 64)[0], row([text], [0])))
    with torch.no_grad():
        if isinstance(scorer, TokenScorer):
            try:
                scorer(alone, own=True)
            except _UNREADABLE as error:
                raise _refused(scorer, f"its own forward pass fails ({_first_line(error)})") from error
        scorer.can_pack = scorer.can_pack and _works(scorer, packed)
        scorer.whole = scorer.whole or not _works(scorer, alone)
    if scorer.whole and not type(scorer).__name__ == "TokenScorer":
        raise _refused(scorer, "its decoder cannot be run apart from its head, which a value model needs")


def _works(scorer: Scorer, packed: Packed) -> bool:
    try:
        scorer(packed)
    except torch.OutOfMemoryError:
        raise
    except _UNREADABLE:
        return False
    return True


def _decided(scorer: Scorer, score: Score, texts: Sequence[Text], agreed: Callable[[float], float]) -> TrainingCheck:
    """Try path by path; `agreed` gives the largest of all ranks' differences, so that all ranks decide the same."""
    own = [score(row([text], [0]), True) for text in texts]
    dtype = next(scorer.model.parameters()).dtype
    rounding = agreed(max(_difference(own[n], score(_with_more_tokens(texts, n), True)) for n in _measured(texts, dtype)))
    if not rounding <= CAUSAL.get(dtype, CAUSAL_16):
        cause = "are not numbers" if math.isnan(rounding) else f"change by {rounding:.2g} nats with the tokens behind them"
        raise _refused(scorer, f"log-probabilities of its own forward pass {cause}")
    tolerance = max(FLOOR.get(dtype, FLOOR_16), MULTIPLE * rounding)
    differences: dict[str, float] = {}
    if scorer.can_pack:
        packed = micro_batches(texts, 2**20)[0]
        differences["packed"] = agreed(_worst(own, packed, score(packed, False)))
        if differences["packed"] <= tolerance:
            return TrainingCheck("packed", tolerance, differences, own)
    for whole in (False, True):
        if whole and (scorer.whole or type(scorer) is not TokenScorer):
            break
        scorer.whole = scorer.whole or whole
        parts = [row([text], [n]) for n, text in enumerate(texts)]
        differences["rows"] = agreed(max(_worst(own, part, score(part, False)) for part in parts))
        if differences["rows"] <= tolerance:
            return TrainingCheck("rows", tolerance, differences, own, _warning(scorer, differences, tolerance))
    worst = " and ".join(f"{difference:.2g} ({path})" for path, difference in differences.items())
    raise _refused(scorer, f"the trainer's log-probabilities differ from its own forward pass by {worst} nats")


def _measured(texts: Sequence[Text], dtype: torch.dtype) -> range:
    """The texts of which rounding is measured: in 16 bits it is the tolerance, and a single text may have little of it."""
    return range(1 if dtype in FLOOR else len(texts))


def _with_more_tokens(texts: Sequence[Text], number: int) -> Packed:
    """Text `number` as a row, with tokens appended whose log-probabilities are not read."""
    text, other = texts[number], texts[number - 1]
    whole = row([Text(text.prompt, [*text.completion, *other.completion])], [0])
    count = len(text.completion)
    whole.predictor, whole.targets, whole.owner = whole.predictor[:count], whole.targets[:count], whole.owner[:count]
    return whole


def _worst(own: Sequence[Tensor], packed: Packed, logp: Tensor) -> float:
    owners = packed.owner.cpu()
    return max(_difference(own[n], logp[owners == n]) for n in owners.unique().tolist())


def _difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference; infinite where one is not a number."""
    return float((one.double() - other.double()).abs().nan_to_num(nan=math.inf).max())


def _warning(scorer: Scorer, differences: dict[str, float], tolerance: float) -> str:
    name, packed = type(scorer.model).__name__, differences.get("packed")
    cause = (
        "cannot read packed texts"
        if packed is None
        else f"computes packed texts {packed:.2g} nats away from its own forward pass (tolerance {tolerance:.2g})"
    )
    return f"{name} {cause}: it is trained one text per row, which is slower"


def _refused(scorer: Scorer, what: str) -> UserError:
    hint = "take another model, or float32 weights if these have 16 bits"
    return UserError(f"`{type(scorer.model).__name__}` cannot be trained: {what}", where="model", mend=hint)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- texts ---

HEAD, TAIL = 16, 16
"""Tokens of a prompt's beginning and end that are taken."""
ANSWER = 12
"""Tokens of a completion: more than convolutions of hybrids look back (4)."""


def check_texts(model: nn.Module, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]] = ()) -> list[Text]:
    """A few short texts of a stage's own tokens: two completions of one prompt, and one of another prompt.

    model: the texts are as short as its window and its positions want; prompts: token ids of the stage's prompts, of which the
    beginning and the end are taken; answers: token ids of completions, which are filled up with tokens of the prompts.
    """
    scorer_limits = [limit for limit in (text_limit(model), window(model.config)) if limit is not None]
    longest = min([*scorer_limits, HEAD + TAIL + ANSWER])
    answer = max(2, min(ANSWER, longest // 2))
    shortened = [short_prompt(prompt, max(1, longest - answer)) for prompt in prompts]
    first = shortened[0]
    second = next((prompt for prompt in shortened if prompt != first), [*first[1:], first[0]])
    pool = [token for tokens in (*answers, *prompts) for token in tokens]
    pool = pool or list(first)
    completions = []
    for number in range(3):
        begun = list(answers[number])[:answer] if number < len(answers) else []
        start = number * (ANSWER + 1)
        filling = [pool[(start + place) % len(pool)] for place in range(answer - number - len(begun))]
        completions.append([*begun, *filling])
    return [Text(prompt, completion) for prompt, completion in zip((first, first, second), completions, strict=True)]


def short_prompt(prompt: Sequence[int], longest: int = HEAD + TAIL) -> list[int]:
    """The beginning and the end of a prompt."""
    if len(prompt) <= longest:
        return list(prompt)
    tail = longest // 2
    return [*prompt[: longest - tail], *prompt[len(prompt) - tail :]]
