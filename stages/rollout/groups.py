"""From problems to groups of answers: render, encode, sample."""

from stages.problems.episode import Episode, Group, Problem
from stages.problems.templates import Template
from stages.rollout.protocol import Request, Rollout, Sampling


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
) -> list[Group]:
    """Sample `samples` answers to each problem. The episodes are not scored yet."""
    prompts = [template.render(problem.question) for problem in problems]
    requests = [
        Request(key=problem.question, prompt_ids=rollout.encode(prompt), samples=samples)
        for problem, prompt in zip(problems, prompts, strict=True)
    ]
    answers = rollout.sample(requests, sampling, seed=seed, purpose=purpose, step=step)
    groups = []
    for problem, prompt, request, completions in zip(problems, prompts, requests, answers, strict=True):
        group = Group(problem)
        for number, completion in enumerate(completions):
            group.episodes.append(
                Episode(
                    problem=problem,
                    sample=request.first_sample + number,
                    prompt=prompt,
                    prompt_ids=list(request.prompt_ids),
                    completion_ids=completion.ids,
                    logprobs=completion.logprobs,
                    text=template.opened + completion.text,
                    finish=completion.finish,
                )
            )
        groups.append(group)
    return groups
