"""One step off: while the policy is updated on one rollout, the next is sampled with the weights from before that update.

Off-policy by one step, and corrected for it: the truncated importance weights π_trainer/π_sampler (`importance_cap`) are over
what drew the answers, whatever it was (IMPALA, arXiv 1802.01561, corrects its actors so). It is meant for samplers and trainers
that have processors of their own, where its gain is not measured; on shared ones it costs a tenth. The first two rollouts are
both of the first policy.

A rollout that is under way belongs to the checkpoint: it was drawn by weights that are gone. Before one is written the rollout
is completed and put where its step's record will be; an attempt that goes on from there reads it instead of sampling.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from stages.engine import distributed
from stages.problems.episode import Group, Problem
from stages.rl.collect import Collected, Scene
from stages.rl.problem_sampler import ProblemSampler
from stages.rollout.records import read_groups, write_groups
from stages.runtime.clock import clock


class Ahead:
    """The rollout that is under way, on one rank. Every rank calls everything on it."""

    def __init__(self, scene: Scene, sampler: ProblemSampler, questions: int, samples: int) -> None:
        """`scene.rollout` gives an engine whose weights no update touches."""
        self._scene, self._sampler, self._questions, self._samples = scene, sampler, questions, samples
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="ahead", initializer=distributed.bind_thread, initargs=(scene.device,)
        )
        self._share: Future[list[Group]] | None = None
        self._problems: list[Problem] = []
        self._collected: Collected | None = None
        self._position = 0

    def begin(self, step: int, position: int) -> None:
        """Begin to sample the rollout of `step` with the weights of now, from the sampler's `position` on."""
        assert self._share is None
        assert self._collected is None
        self._problems, self._position = self._sampler.draw(position, self._questions)
        engine = self._scene.rollout()  # ranks meet in it, so it is not the thread's
        self._share = self._thread.submit(self._scene.share, self._problems, self._samples, "train", step, engine)

    def complete(self) -> None:
        """Wait until what is under way is there: nothing samples any more. Nothing happens when nothing is under way."""
        if self._share is None:
            return
        with clock.span("sample"):
            share = self._share.result()
        groups = self._scene.together(share, len(self._problems))
        self._scene.rest()
        self._share, self._collected = None, Collected(groups, groups, self._position)

    def take(self, step: int, position: int) -> Collected:
        """The rollout of `step`; sampled now when none is under way."""
        if self._share is None and self._collected is None:
            self.begin(step, position)
        self.complete()
        assert self._collected is not None
        found, self._collected = self._collected, None
        return found

    def save(self, record: Path, *, main: bool) -> int | None:
        """Put the rollout that waits to be trained on into `record`; returns where the sampler then stands, or None."""
        self.complete()
        if self._collected is None:
            return None
        if main:
            write_groups(record, self._collected.groups)
        return self._position

    def restore(self, record: Path, position: int) -> None:
        """Take the rollout that `save` put there. Raises UserError when it is not what was written."""
        groups = distributed.gather(read_groups(record) if distributed.number() == 0 else [])[0]
        self._position, self._collected = position, Collected(groups, groups, position)

    def end(self) -> None:
        """Nothing more will be taken."""
        self._thread.shutdown(cancel_futures=True)
