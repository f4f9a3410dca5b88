"""From problems to groups of answers: render, encode, sample."""

from collections.abc import Callable

from stages.problems.episode import Episode, Group, Problem
from stages.problems.templates import Template
from stages.rollout.protocol import Completion, Request, Rollout, Sampling


def sample_groups(
    rollout: Rollout,
    problems: list[Problem],
    template: Template,
    sampling: Sampling,
    samples: int,
    *,
    seed: int,
    purpose: str,
    step: int,
    on_group: Callable[[Group], None] = lambda _: None,
) -> list[Group]:
    """Sample `samples` answers to each problem. The episodes are not scored yet.

    `on_group` gets each group once, as soon as its answers are all there.
    """
    prompts = [template.render(problem.question) for problem in problems]
    requests = [
        Request(key=problem.question, prompt_ids=rollout.encode(prompt), samples=samples)
        for problem, prompt in zip(problems, prompts, strict=True)
    ]
    groups = [Group(problem) for problem in problems]

    def done(number: int, completions: list[Completion]) -> None:
        group, request = groups[number], requests[number]
        for sample, completion in enumerate(completions):
            group.episodes.append(
                Episode(
                    problem=group.problem,
                    sample=request.first_sample + sample,
                    prompt=prompts[number],
                    prompt_ids=list(request.prompt_ids),
                    completion_ids=completion.ids,
                    logprobs=completion.logprobs,
                    text=template.opened + completion.text,
                    finish=completion.finish,
                )
            )
        on_group(group)

    rollout.sample(requests, sampling, seed=seed, purpose=purpose, step=step, done=done)
    return groups
