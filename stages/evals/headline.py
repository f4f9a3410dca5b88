"""What a model's answers add up to: per problem, and in all."""

from collections.abc import Callable

from stages.evals.statistics import majority_credit, mean, pass_at_k
from stages.problems.episode import Episode, Group
from stages.rewards.answers.numbers import last_number, parse_number
from stages.rewards.score import Rewards, final_answer, same_answer


def problem_metrics(group: Group, rewards: Rewards) -> dict[str, float]:
    """The numbers of one problem: means over its k scored answers, and its majority vote.

    An answer without a verdict is not right; `no_verdict` says how many there are. `accuracy_lenient` asks for no tags: an
    answer is right, too, whose last number is the reference, wherever it stands, and even where the limit cut it or there was
    no verdict. What it has above `accuracy` is about what the format alone would bring.
    """
    right = [e.scored.verdict == "right" for e in group.episodes]
    verifier = None if group.problem.verifier == "unjudged" else group.problem.verifier
    answers = [None if e.truncated else final_answer(e.text, rewards.answer_in) for e in group.episodes]
    k = len(right)
    numbers = {
        "accuracy": mean([float(r) for r in right]),
        "accuracy_lenient": mean([float(r or _states(e)) for r, e in zip(right, group.episodes, strict=True)]),
        "cons_at_k": majority_credit(answers, right, lambda a, b: same_answer(a, b, rewards, verifier)),
        "format": mean([e.scored.parts.get("format", 0.0) for e in group.episodes]),
        "truncated": mean([float(e.truncated) for e in group.episodes]),
        "no_verdict": mean([float(e.scored.verdict == "none") for e in group.episodes]),
        "mean_length": mean([float(len(e.completion_ids)) for e in group.episodes]),
    }
    exponents = range(1, k.bit_length())
    return numbers | {f"pass_at_{2**i}": pass_at_k(k, sum(right), 2**i) for i in exponents}


def _states(episode: Episode) -> bool:
    """Whether the last number of the answer is the reference."""
    reference = parse_number(episode.problem.answer)
    return reference is not None and last_number(episode.text) == reference


def answer_metrics(groups: list[Group]) -> dict[str, float]:
    """Numbers over some of the answers only: the lengths of right and of other ones, the language of those that think.

    A number that no answer has is left out.
    """
    episodes = [episode for group in groups for episode in group.episodes]

    def share(name: str, value: Callable[[Episode], float], among: list[Episode]) -> dict[str, float]:
        return {name: mean([value(episode) for episode in among])} if among else {}

    def length(episode: Episode) -> float:
        return float(len(episode.completion_ids))

    return {
        **share("mean_length_right", length, [e for e in episodes if e.scored.verdict == "right"]),
        **share("mean_length_wrong", length, [e for e in episodes if e.scored.verdict != "right"]),
        **share("language", lambda e: e.scored.parts["language"], [e for e in episodes if "language" in e.scored.parts]),
    }
