"""On which paths a class is trained and sampled, and how far its log-probabilities there are from its own forward's."""

import copy
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stages.contract.errors import UserError
from stages.engine.packing.pack import Text, micro_batches, row
from stages.engine.scorer import TokenScorer
from stages.engine.self_check import check_scorer, check_texts
from stages.rollout.decoding.decoder import unsupported
from stages.rollout.protocol import Request, Sampling
from stages.rollout.torch_engine import TorchRollout
from tests.architectures.build import VOCABULARY, WINDOW, build, own_logits

TRAIN_PATHS = {"packed": "packed texts", "rows": "one text per row", "refused": "refused"}
SAMPLE_PATHS = {
    "fast": "compiled or PyTorch decoder",
    "padded, shared": "fallback: cache, prompts of all lengths together",
    "equal, shared": "fallback: cache, prompts of one length together",
    "equal, rows": "fallback: cache, prompts of one length together, rows stay to the end",
    "equal, none": "fallback: no cache, the whole text for every token",
    "refused": "refused",
}


@dataclass
class Paths:
    """What was found of a class."""

    train: str
    """A key of `TRAIN_PATHS`."""
    sample: str
    """A key of `SAMPLE_PATHS`."""
    differences: dict[str, float] = field(default_factory=dict)
    """Largest difference in nats from the model's own forward on each text alone, by what was computed."""
    refusals: dict[str, str] = field(default_factory=dict)
    """The line of the error, by `train` and `sample`."""
    lengths: set[int] = field(default_factory=set)
    """Tokens of the sampled answers."""


def paths(name: str, tokenizer: Any) -> Paths:
    """Train and sample a small model of this class (its scorer first, as a stage does) and compare with an untouched copy."""
    model = build(name)
    reference = copy.deepcopy(model)
    found = Paths("refused", "refused")
    try:
        found.train = _trained(model, reference, found.differences)
    except UserError as error:
        found.refusals["train"] = str(error)
    try:
        found.sample = _sampled(model, reference, tokenizer, found)
    except UserError as error:
        found.refusals["sample"] = str(error)
    return found


def _tokens(count: int, seed: int) -> list[int]:
    return torch.randint(4, VOCABULARY - 4, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def _logp(reference: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """Log-probabilities of a completion by the model's own forward on the text alone."""
    logits = own_logits(reference, torch.tensor([[*prompt, *completion]]))[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)


def _trained(model: Any, reference: Any, differences: dict[str, float]) -> str:
    """The training path, and how far log-probabilities on it are away, of texts within windows and of longer ones."""
    prompt = _tokens(5, 1)
    short = [Text(prompt, _tokens(7, 2)), Text(prompt, _tokens(4, 3)), Text(_tokens(4, 4), _tokens(9, 5))]
    long = [Text(prompt, _tokens(2 * WINDOW, 6)), Text(_tokens(3, 7), _tokens(WINDOW + 7, 8))]
    scorer = TokenScorer(model)
    path = check_scorer(scorer, check_texts(model, [text.prompt for text in short])).path
    scorer.eval()
    for kind, texts in (("train", short), ("train beyond the window", long)):
        packed = path == "packed" and (kind == "train" or scorer.window is None)
        batches = micro_batches(texts, 2**20) if packed else [row([text], [n]) for n, text in enumerate(texts)]
        with torch.no_grad():
            logps = [(batch.owner, scorer(batch)[0]) for batch in batches]
        assert {n for owner, _ in logps for n in owner.tolist()} == set(range(len(texts)))
        differences[kind] = max(
            float((logp[owner == n] - _logp(reference, texts[n].prompt, texts[n].completion)).abs().max())
            for owner, logp in logps
            for n in owner.unique().tolist()
        )
    return path


def _sampled(model: Any, reference: Any, tokenizer: Any, found: Paths) -> str:
    """The decoding path, and how far sampled log-probabilities are away: prompts of three lengths, answers that leave early."""
    engine = TorchRollout(model, tokenizer)
    engine.end_tokens = frozenset(range(0, VOCABULARY, 12))  # so many that answers end at different times
    prompts = [_tokens(20, 11), _tokens(6, 12), _tokens(6, 13), _tokens(2, 14)]
    requests = [Request(str(n), tuple(prompt), samples=4) for n, prompt in enumerate(prompts)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="sampling takes the slow path")
        answers = engine.sample(requests, Sampling(max_tokens=WINDOW + 4), seed=0, purpose="sweep", step=0)
    found.lengths = {len(answer.ids) for group in answers for answer in group}
    found.differences["sample"] = max(
        float((torch.tensor(answer.logprobs) - _logp(reference, prompt, answer.ids)).abs().max())
        for prompt, group in zip(prompts, answers, strict=True)
        for answer in group
    )
    if not unsupported(model):
        return "fast"
    mode = engine._mode
    assert mode is not None
    return f"{'padded' if mode.padded else 'equal'}, {mode.cache}"
