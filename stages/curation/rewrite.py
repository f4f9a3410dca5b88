"""Rewriting: another model puts a chosen answer into a first-person style that people like to read, and may sum it up.

The paper has R1-Zero's answers rewritten by DeepSeek-V3 and checked by people (section 2.3.1). Here what comes back is judged
as a sampled answer is, by the same verifier and filters: one that is no longer right or readable is dropped.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from stages.contract.config import Config
from stages.curation.endpoint import Endpoint
from stages.curation.filters import Filters, first_failure
from stages.curation.ledger import Ledger
from stages.problems.episode import Episode, Reward
from stages.rewards.score import Rewards, score
from stages.store.folders import StageFolder
from stages.store.stage import StopRequest

_STYLE = (
    "You edit worked solutions. You are given a question and a solution of it. Write the solution anew in the first person, as "
    "somebody who thinks aloud: plain, natural sentences in the language of the question, every step that leads to the result, "
    "detours and corrections kept where they help, repetition and clutter removed. Add no new ideas and change no result. "
    "Reply with nothing but these two parts, each tag exactly once:\n<think>the reasoning</think>\n"
)
INSTRUCTION = _STYLE + "<answer>the final answer alone, as in the solution</answer>"
"""What the endpoint is told to do."""
INSTRUCTION_SUMMARY = _STYLE + (
    "<answer>a summary of at most five sentences of how the question is solved, which ends with the final answer in \\boxed{}"
    "</answer>"
)
"""The same with a summary."""
REFUSED = "refused"


class Rewrite(Config):
    """Who rewrites the chosen answers, and how."""

    endpoint: Endpoint
    """Where it is done."""
    summary: bool = False
    r"""Whether the answer's tags hold a short summary that ends in `\boxed{}`, instead of the final answer alone. It wants the
    verifier `math`, which looks at no answer of more than 1,000 characters."""
    instruction: str | None = Field(default=None, min_length=1)
    """The system text of the request; null: our own."""

    def messages(self, episode: Episode) -> list[dict[str, str]]:
        """The chat that asks for one answer."""
        system = self.instruction or (INSTRUCTION_SUMMARY if self.summary else INSTRUCTION)
        user = f"Question:\n{episode.problem.question}\n\nSolution:\n{episode.text.strip()}"
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]


@dataclass(frozen=True)
class Rewritten:
    """What became of one answer."""

    episode: Episode
    """As it was written anew; as it was sampled where that was refused."""
    failure: str | None
    """`refused`, the filter that it fails now, or None."""
    model: str
    """Who wrote it: the model's name as the endpoint says it."""


class Rewriting:
    """The rewriting of one stage. What was answered and how it was judged lies in the stage's folder."""

    def __init__(self, settings: Rewrite, folder: StageFolder, stop: StopRequest, filters: Filters, rewards: Rewards) -> None:
        from stages.curation.client import Client

        self._settings, self._filters, self._rewards = settings, filters, rewards
        self._replies = Ledger(folder.path / "rewrites" / "replies.jsonl")
        self._judged = Ledger(folder.path / "rewrites" / "judged.jsonl")
        self._client = Client(settings.endpoint, self._replies, stop)

    def rewrite(self, episodes: list[Episode]) -> list[Rewritten]:
        """What became of some answers, in their order. Only what is missing is asked for or judged."""
        keys = self._client.ask([self._client.body(self._settings.messages(episode)) for episode in episodes])
        written = [_written(e, self._replies[key]) for e, key in zip(episodes, keys, strict=True)]
        self._judge({f"{key}-{e.problem.id}-{e.sample}": e for e, key in zip(written, keys, strict=True)})
        return [self._became(episode, key) for episode, key in zip(written, keys, strict=True)]

    def _judge(self, written: dict[str, Episode]) -> None:
        """A verdict may depend on the machine's speed (time-outs), so it is given once."""
        new = {key: episode for key, episode in written.items() if key not in self._judged}
        longest = self._settings.endpoint.max_tokens
        score(self._rewards, list(new.values()), max_tokens=longest, key="rewrite")
        for key, episode in new.items():
            self._judged.add(key, dataclasses.asdict(episode.scored))
        for key, episode in written.items():
            episode.reward = Reward(**self._judged[key])

    def _became(self, episode: Episode, key: str) -> Rewritten:
        reply = self._replies[key]
        failure = REFUSED if REFUSED in reply else first_failure(episode, self._filters, self._rewards)
        return Rewritten(episode, failure, reply.get("model") or self._settings.endpoint.model)


def _written(episode: Episode, reply: dict[str, Any]) -> Episode:
    """The answer as it was written anew, not judged yet; it begins with the same white space, which the prompt expects."""
    if REFUSED in reply:
        return dataclasses.replace(episode)
    lead = episode.text[: len(episode.text) - len(episode.text.lstrip())]
    finish: Any = "length" if reply["finish"] == "length" else "stop"
    return dataclasses.replace(episode, text=lead + reply["text"].strip(), finish=finish, reward=None)
