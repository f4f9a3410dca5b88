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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stages.engine import distributed
from stages.engine.packing.pack import Packed, Text, TrainingPath, micro_batches, row
from stages.engine.scorer import Scorer, TokenScorer, refused
from stages.engine.windows import text_limit, window

if TYPE_CHECKING:
    from stages.engine.deepspeed_engine import Engine

FLOOR = {torch.float64: 1e-5, torch.float32: 1e-4}
"""Least tolerance in nats by number format; log-probabilities are computed in float32 from float64 logits too."""
FLOOR_16 = 0.02
"""The same for 16-bit formats."""
MULTIPLE = 4.0
"""The tolerance as a multiple of the model's own rounding, where that is more than the floor."""
MULTIPLE_16 = 3.0
"""In 16-bit formats also as a multiple of the spacing of numbers as large as the largest log-probability: logits of that size
are rounded so at least, and rows of one shape may all be rounded alike. (Measured on random Llamas and GPT-2s: packed texts
differ by up to 1.2 spacings, with a leak of one position by 3.5 to 500.)"""
CAUSAL = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Most nats by which appended tokens may change earlier log-probabilities by rounding."""
CAUSAL_16 = 1.0
"""The same for 16-bit formats."""

Score = Callable[[Packed], Tensor]
"""(N,) log-probabilities of a micro-batch's predicted tokens, on the CPU."""
Agree = Callable[[float], float]
"""The largest of all ranks' differences, so that all ranks decide the same."""


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


def check_scorer(scorer: TokenScorer, texts: Sequence[Text], temperature: float = 1.0) -> TrainingCheck:
    """As `check_engine`, of a scorer without DeepSpeed. It is left ready for the path that is found."""
    training = {module: module.training for module in scorer.modules()}
    scorer.eval().probe()
    with torch.no_grad():
        check = _decided(
            scorer,
            lambda packed: scorer(packed, temperature)[0].cpu(),
            lambda packed: scorer(packed, temperature, own=True)[0].cpu(),
            texts,
            lambda difference: difference,
        )
    for module, mode in training.items():
        module.training = mode
    return check


def check_engine(engine: "Engine", texts: Sequence[Text], temperature: float = 1.0) -> TrainingCheck:
    """Compare the engine's log-probabilities with the model's own, and set the engine's path. Every rank calls it.

    Nothing is changed but the path: no gradient, no random number, no state of the optimizer. Ranks may have different texts,
    but equally many.
    Raises UserError when the model's own forward depends on later tokens, or no path agrees with it.
    """
    with torch.no_grad():
        check = _decided(
            engine.scorer,
            lambda packed: engine.score(packed, temperature)[0].cpu(),
            lambda packed: engine.score(packed, temperature, own=True)[0].cpu(),
            texts,
            largest_of_ranks,
        )
    engine.path = check.path
    return check


def largest_of_ranks(difference: float) -> float:
    """The largest of all ranks' differences; every rank calls it."""
    return max(distributed.gather(difference))


def own_logprobs(model: nn.Module, score_own: Score, texts: Sequence[Text], agree: Agree) -> tuple[list[Tensor], float]:
    """Log-probabilities of each text's completion by the model's own forward (`score_own`), and the tolerance in nats.

    Raises UserError when they depend on later tokens, or are not numbers.
    """
    own = [score_own(row([text], [0])) for text in texts]
    dtype = next(model.parameters()).dtype
    measured = _measured(texts, dtype)
    rounding = agree(max(largest_difference(own[n], score_own(_with_more_tokens(model, texts, n))) for n in measured))
    if not all(bool(logp.isfinite().all()) for logp in own):
        raise refused(model, "log-probabilities of its own forward pass are not finite")
    if rounding > CAUSAL.get(dtype, CAUSAL_16):
        raise refused(model, f"log-probabilities of its own forward pass change by {rounding:.2g} nats with later tokens")
    tolerance = max(FLOOR.get(dtype, FLOOR_16), MULTIPLE * rounding)
    if dtype not in FLOOR:
        largest = agree(max(float(logp.abs().max()) for logp in own))
        tolerance = max(tolerance, MULTIPLE_16 * torch.finfo(dtype).eps * largest)
    return own, tolerance


def _decided(scorer: Scorer, score: Score, score_own: Score, texts: Sequence[Text], agree: Agree) -> TrainingCheck:
    """Try path by path."""
    own, tolerance = own_logprobs(scorer.model, score_own, texts, agree)
    differences: dict[str, float] = {}
    if scorer.can_pack:
        packed = micro_batches(texts, 2**20)[0]
        differences["packed"] = agree(_worst(own, packed, score(packed)))
        if differences["packed"] <= tolerance:
            return TrainingCheck("packed", tolerance, differences, own)
    for whole in (False, True):
        if whole and (scorer.whole or scorer.needs_states):
            break
        scorer.whole = scorer.whole or whole
        parts = [row([text], [n]) for n, text in enumerate(texts)]
        differences["rows"] = agree(max(_worst(own, part, score(part)) for part in parts))
        if differences["rows"] <= tolerance:
            return TrainingCheck("rows", tolerance, differences, own, _warning(scorer, differences, tolerance))
    worst = " and ".join(f"{difference:.2g} ({path})" for path, difference in differences.items())
    raise refused(scorer.model, f"the trainer's log-probabilities differ from its own forward pass by {worst} nats")


def _measured(texts: Sequence[Text], dtype: torch.dtype) -> range:
    """The texts of which rounding is measured: in 16 bits it is the tolerance, and a single text may have little of it."""
    return range(1 if dtype in FLOOR else len(texts))


def _with_more_tokens(model: nn.Module, texts: Sequence[Text], number: int) -> Packed:
    """Text `number` as a row, with tokens appended, as far as positions go, whose log-probabilities are not read."""
    text, other = texts[number], texts[number - 1]
    room = max(0, (text_limit(model) or 2**31) - len(text.prompt) - len(text.completion))
    whole = row([Text(text.prompt, [*text.completion, *other.completion[: min(room, APPENDED)]])], [0])
    count = len(text.completion)
    whole.predictor, whole.targets, whole.owner = whole.predictor[:count], whole.targets[:count], whole.owner[:count]
    return whole


def _worst(own: Sequence[Tensor], packed: Packed, logp: Tensor) -> float:
    owners = packed.owner.cpu()
    return max(largest_difference(own[n], logp[owners == n]) for n in owners.unique().tolist())


def largest_difference(one: Tensor, other: Tensor) -> float:
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


# --- texts ---

FEW = 8
"""Texts of a stage from which the check makes its own."""
HEAD, TAIL = 16, 8
"""Tokens of a prompt's beginning and end that are taken; the beginning is long enough to be shared as a prefix."""
APPENDED = 8
"""Tokens behind a text that must change nothing."""
ANSWER = 12
"""Tokens of a completion: more than convolutions of hybrids look back (4)."""


def check_prompts(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Two different prompts, as short as the model's window and positions want: the beginning and the end of a stage's own.

    prompts: token ids, at least one prompt; a second one is made of the first where there is none.
    """
    most = max(1, _longest(model) - _answer_length(model))
    shortened = [_shortened(prompt, min(most, HEAD + TAIL)) for prompt in prompts]
    first = shortened[0]
    return first, next((prompt for prompt in shortened if prompt != first), [*first[1:], first[0]])


def check_texts(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]] = ()) -> list[Text]:
    """A few short texts of a stage's own tokens: two completions of one prompt (`check_prompts`), and one of another.

    answers: token ids of completions, such as sampled ones; they are filled up with tokens of the prompts.
    """
    first, second = check_prompts(model, prompts)
    pool = [token for tokens in (*answers, *prompts) for token in tokens]
    texts = []
    for number, prompt in enumerate((first, first, second)):
        begun = list(answers[number]) if number < len(answers) else []
        length = max(2, _answer_length(model) - number)  # different lengths: packing fills them up
        filling = [pool[(number * (ANSWER + 1) + place) % len(pool)] for place in range(length)]
        texts.append(Text(prompt, [*begun, *filling][:length]))
    return texts


def sampled_length(model: Any) -> int:
    """Tokens to sample for a check: the texts of `check_texts` have more."""
    return min(8, max(1, _answer_length(model) - 2))


def _longest(model: Any) -> int:
    limits = [limit for limit in (text_limit(model), window(model.config)) if limit is not None]
    return max(3, min([*limits, HEAD + TAIL + ANSWER]))


def _answer_length(model: Any) -> int:
    return min(ANSWER, max(2, _longest(model) // 2))


def _shortened(prompt: Sequence[int], longest: int) -> list[int]:
    if len(prompt) <= longest:
        return list(prompt)
    tail = longest * TAIL // (HEAD + TAIL)
    return [*prompt[: longest - tail], *prompt[len(prompt) - tail :]]
