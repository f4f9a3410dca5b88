"""lm-eval's language model over our rollout engine: what is evaluated is sampled as it is in training.

lm-eval asks k times for one prompt by listing the same request object k times; its answer cache leaves sampled requests out.
So the samples are numbered here, and finished chunks of problems are kept here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from stages.contract.errors import UserError
from stages.problems.episode import Episode, Group, Problem
from stages.rollout.protocol import Request, Rollout, Sampling
from stages.rollout.records import read_groups, write_groups

PURPOSE = "evaluate"
"""Names these samples' random numbers. They are the same for every model, which narrows the error of differences."""


@dataclass(frozen=True)
class Ask:
    """A prompt that lm-eval wants answered."""

    problem: Problem
    prompt: str
    samples: int
    sampling: Sampling
    source: Instance


@dataclass
class Hooks:
    """What happens around chunks."""

    score: Callable[[list[Group]], None] = lambda _groups: None
    """Gives rewards to fresh groups of our own task, before they are written."""
    chunk_done: Callable[[int, int], None] = lambda _done, _total: None
    """Told of every finished chunk, of those kept from an earlier attempt too."""
    check_stop: Callable[[], None] = lambda: None
    """May raise between chunks."""


class RolloutLM(TemplateLM):
    """Answers lm-eval's requests with a `Rollout`. `groups` has every sampled answer by problem id."""

    def __init__(
        self,
        rollout: Rollout,
        folder: Path,
        *,
        seed: int,
        problems: dict[str, Problem],
        chunk: int = 64,
        opened: str = "",
        hooks: Hooks | None = None,
    ) -> None:
        """`folder`: where chunks are kept; `problems`: our own task's, by id; `opened`: what their prompts have opened."""
        super().__init__()
        self.rollout, self.folder, self.seed, self.problems = rollout, folder, seed, problems
        self.chunk, self.opened, self.hooks = chunk, opened, hooks or Hooks()
        self.groups: dict[str, Group] = {}
        self.tokenizer = getattr(rollout, "tokenizer", None)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """One text per request, cut before its first stop text as lm-eval wants it; `groups` keeps the whole ones.

        Raises what `hooks.check_stop` raises.
        """
        answers: dict[int, list[str]] = {}
        chunks = self._chunks(requests)
        for number, chunk in enumerate(chunks):
            self.hooks.check_stop()
            groups = self._answered(self.folder / f"chunk-{number:05d}.parquet", chunk)
            for ask, group in zip(chunk, groups, strict=True):
                self.groups[group.problem.id] = group
                texts = [_before_stop(e.text, ask.sampling.stop) for e in group.episodes]
                answers[id(ask.source)] = texts[::-1]
            self.hooks.chunk_done(number + 1, len(chunks))
        return [answers[id(request)].pop() for request in requests]

    def _chunks(self, requests: list[Instance]) -> list[list[Ask]]:
        """Requests by prompt, cut into chunks of one task and one sampling each."""
        counts: dict[int, int] = {}
        for request in requests:
            counts[id(request)] = counts.get(id(request), 0) + 1
        asks = [self._ask(request, counts.pop(id(request))) for request in requests if id(request) in counts]
        chunks = []
        for _, same in groupby(asks, key=lambda ask: (ask.source.task_name, ask.sampling.model_dump_json())):
            run = list(same)
            chunks += [run[start : start + self.chunk] for start in range(0, len(run), self.chunk)]
        return chunks

    def _ask(self, request: Instance, samples: int) -> Ask:
        prompt, settings = request.args
        problem = self.problems.get(request.doc.get("problem_id", ""))
        if problem is None:  # a task of lm-eval's own
            name = f"{request.task_name}:{request.doc_id}:{request.idx}"
            problem = Problem(id=name, question=prompt, answer="", source=str(request.task_name))
        return Ask(problem, prompt, samples, sampling_of(settings), request)

    def _answered(self, path: Path, chunk: list[Ask]) -> list[Group]:
        """The chunk's answers: those on disk when they are to the same prompts, else fresh ones."""
        if path.exists():
            kept = read_groups(path)
            found = [(g.problem, g.episodes[0].prompt, len(g.episodes)) for g in kept]
            if found == [(a.problem, a.prompt, a.samples) for a in chunk]:
                return kept
        requests = [Request(a.problem.question, self.rollout.encode(a.prompt), a.samples) for a in chunk]
        answers = self.rollout.sample(requests, chunk[0].sampling, seed=self.seed, purpose=PURPOSE, step=0)
        groups = []
        for ask, request, completions in zip(chunk, requests, answers, strict=True):
            opened = self.opened if ask.problem.id in self.problems else ""
            group = Group(ask.problem)
            for number, completion in enumerate(completions):
                episode = Episode(
                    problem=ask.problem,
                    sample=number,
                    prompt=ask.prompt,
                    prompt_ids=list(request.prompt_ids),
                    completion_ids=completion.ids,
                    logprobs=completion.logprobs,
                    text=opened + completion.text,
                    finish=completion.finish,
                )
                group.episodes.append(episode)
            groups.append(group)
        self.hooks.score([group for group in groups if group.problem.id in self.problems])
        write_groups(path, groups)
        return groups

    @property
    def eot_token_id(self) -> int:
        """The end token, which stands before texts that have no context."""
        _, tokenizer = self._model_and_tokenizer()
        if tokenizer.eos_token_id is not None:
            return int(tokenizer.eos_token_id)
        if ends := getattr(self.rollout, "end_tokens", ()):
            return int(min(ends))
        mend = "set eos_token in the model's tokenizer_config.json"
        raise UserError("the model declares no end token, which texts without context begin with", where="tasks", mend=mend)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, as in prompts unless said otherwise."""
        if add_special_tokens is None or add_special_tokens:
            return list(self.rollout.encode(string))
        return list(self._model_and_tokenizer()[1].encode(string, add_special_tokens=False))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        from stages.evals.likelihood import continuation_scores

        model, _tokenizer = self._model_and_tokenizer()
        return continuation_scores(model, [(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """Log-probability (nats) of each whole text, in windows as long as the model allows."""
        from stages.evals.likelihood import continuation_scores, longest_text

        model, _ = self._model_and_tokenizer()
        totals = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, longest_text(model), context_len=1)
            pairs = [make_disjoint_window(window) for window in windows]
            totals.append(sum(score for score, _ in continuation_scores(model, pairs)))
        return totals

    def _model_and_tokenizer(self) -> tuple[Any, Any]:
        model = getattr(self.rollout, "model", None)
        if model is None or self.tokenizer is None:
            raise UserError(
                "this engine gives no likelihoods", where="tasks", mend="take the torch engine, or tasks that sample"
            )
        return model, self.tokenizer


def sampling_of(settings: dict[str, Any]) -> Sampling:
    """An lm-eval task's generation settings as ours; like lm-eval, a task that does not ask for sampling is greedy."""
    until = settings.get("until") or []
    sampled = settings.get("do_sample", False)
    return Sampling(
        temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
        top_p=float(settings.get("top_p", 1.0)),
        max_tokens=int(settings.get("max_gen_toks", 256)),
        stop=(until,) if isinstance(until, str) else tuple(text for text in until if text),
    )


def _before_stop(text: str, stop: tuple[str, ...]) -> str:
    return text[: min([len(text), *(place for s in stop if (place := text.find(s)) >= 0)])]
