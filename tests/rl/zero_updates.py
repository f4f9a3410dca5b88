"""A rank of the ZeRO test: makes updates on recorded groups for each case, and leaves weights, gradients and statistics.

`torchrun … zero_updates.py FOLDER`: in it cases.json, name -> settings and `recorded`, the file of groups in FOLDER; `device`
and `dtype` are the CPU and float32 unless a case says otherwise.
"""

import json
import os
import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad

from stages.engine import distributed, scorer
from stages.engine.checkpoint.checkpointer import Checkpointer
from stages.engine.deepspeed_engine import Engine
from stages.engine.packing.pack import Text, alone
from stages.engine.scorer import TokenScorer, TokenValueScorer, ValueScorer
from stages.engine.self_check import check_engine, check_texts
from stages.rl.prepare import prepare
from stages.rl.reference import Reference
from stages.rl.settings import GRPO
from stages.rl.update import update
from stages.rollout.records import read_groups
from tests.conftest import tiny_llama


class Recorded(Engine):
    """Keeps the whole gradient of its last step, before it is clipped."""

    gradient = torch.zeros(0)

    def step(self, lr: float) -> float:
        parameters = [p for p in self.engine.module.parameters() if p.requires_grad]
        self.gradient = torch.cat([safe_get_full_grad(p).flatten().to("cpu", copy=True) for p in parameters])
        return super().step(lr)


def main() -> None:
    # Ranks have unequal numbers of predicted tokens, so they would make unequal numbers of passes through the head.
    scorer.CHUNK = 5
    folder = Path(sys.argv[1])
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        groups, count, cuts = read_groups(folder / case.pop("recorded")), case.pop("groups", None), case.pop("cuts", None)
        copies, resume = case.pop("copies", None), case.pop("resume", None)
        path = case.pop("path", None)
        device, dtype = case.pop("device", "cpu"), getattr(torch, case.pop("dtype", "float32"))
        settings = GRPO(lr=1e-3, **case)
        ppo, shared = settings.algorithm == "ppo", settings.critic.model == "shared"
        made = TokenValueScorer if ppo and shared else TokenScorer
        policy = Recorded(made(tiny_llama().to(dtype)), settings, settings.deepspeed, device)
        critic = None
        if ppo and not shared:
            critic = Recorded(ValueScorer(tiny_llama().to(dtype)), settings, settings.deepspeed, device)
        if path:
            check = check_engine(policy, check_texts(policy.model, [[3, 4, 5], [6, 7]]))
            assert check.path == "packed"
            assert check.differences["packed"] <= check.tolerance
            for made_engine in (policy, *([critic] if critic else [])):
                made_engine.path = path
        reference = Reference(tiny_llama(seed=1).to(dtype), policy.device) if settings.kl else None
        found: dict[str, list] = {"gradients": [], "stats": [], "passes": []}

        def step(number: int, cut: GRPO, lr: float) -> None:
            models = {"reference": reference, "critic": critic}  # noqa: B023  called at once
            where = {"seed": 0, "step": number, "temperature": 1.0, "max_tokens": 10}
            prepared = prepare(groups[:count], cut, policy, **where, **models)  # noqa: B023
            for batch in prepared.minibatches:
                stats = update(policy, batch, cut, lr=lr, temperature=1.0, critic=critic)  # noqa: B023
                found["stats"].append(vars(stats))  # noqa: B023
                found["gradients"].append(policy.gradient)  # noqa: B023
                found["passes"].append([len(packed.owner.unique()) for packed in batch.micro])  # noqa: B023

        if copies:
            first = groups[0].episodes[0]
            text = alone([Text(first.prompt_ids, first.completion_ids)])[0]
            for count in copies:
                policy.accumulate([lambda: policy.score(text)[0].mean() / count] * count)  # noqa: B023  called at once
                policy.step(0.0)
                found["gradients"].append(policy.gradient)
        elif cuts is None:
            # What the second step leaves is saved; a case with `resume` begins there, whatever layout saved it.
            first = 0
            if resume:
                stored = Checkpointer(folder / resume, settings.checkpoints, distributed.number()).restore(distributed.size())
                policy.restore(stored.part("policy"))
                if critic:
                    critic.restore(stored.part("critic"))
                first = stored.state["step"]
            for number in range(first, 3):
                step(number, settings, 1e-3)
                if number == 1 and not resume:
                    parts = {"policy": policy.state()} | ({"critic": critic.state()} if critic else {})
                    checkpointer = Checkpointer(folder / "saved" / name, settings.checkpoints, distributed.number())
                    checkpointer.begin(2, {}, parts)
                    checkpointer.finish()
        else:  # a learning rate of 0 leaves the weights: one engine does for all cuts
            for cut in cuts:
                step(0, GRPO(**settings.model_dump() | {"packing": cut}), 0.0)
        with policy.whole_weights() as model:
            weights = [p.detach().flatten().to("cpu", copy=True) for p in model.parameters()]
        if critic:
            with critic.whole_weights() as model:
                weights += [p.detach().flatten().to("cpu", copy=True) for p in model.parameters()]
        if distributed.number() == 0:
            torch.save(found | {"weights": torch.cat(weights)}, folder / f"{name}.pt")
    distributed.barrier()
    sys.stderr.flush()
    # As a stage's process does: gloo's and DeepSpeed's threads may abort the interpreter's teardown.
    os._exit(0)


if __name__ == "__main__":
    main()
