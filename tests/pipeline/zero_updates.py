"""A rank of the ZeRO test: makes three GRPO updates on recorded groups under each ZeRO stage, and leaves the weights.

`torchrun … zero_updates.py GROUPS OUTPUT STAGE…`
"""

import sys
from pathlib import Path

import torch

from stages.engine import ranks, scorer
from stages.engine.deepspeed_engine import Engine
from stages.grpo.prepare import prepare
from stages.grpo.settings import GRPO
from stages.grpo.update import update
from stages.rollout.records import read_groups
from tests.conftest import tiny_llama


def main() -> None:
    # Ranks have unequal numbers of predicted tokens, so they would make unequal numbers of passes through the head.
    scorer.CHUNK = 5
    recorded, output = read_groups(Path(sys.argv[1])), Path(sys.argv[2])
    for case in sys.argv[3:]:
        zero, row, micro, minibatches, count = case.split(":")
        groups = recorded[: int(count)]
        settings = GRPO(
            lr=1e-3,
            kl=0.05,
            minibatches=int(minibatches),
            packing={"row_tokens": int(row), "micro_tokens": int(micro)},
            deepspeed=zero,
        )
        engine = Engine(tiny_llama().float(), settings, zero, "cpu")
        reference = Engine(tiny_llama(seed=1).float(), settings, "zero0", "cpu").score
        stats = []
        for step in range(3):
            batches = prepare(groups, settings, engine, seed=0, step=step, temperature=1.0, reference=reference)
            stats += [update(engine, batch, settings, lr=1e-3, temperature=1.0) for batch in batches]
        with engine.whole_weights() as model:
            weights = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        if ranks.number() == 0:
            torch.save({"weights": weights, "stats": [vars(s) for s in stats]}, output / f"{case.replace(':', '-')}.pt")
    ranks.barrier()


if __name__ == "__main__":
    main()
