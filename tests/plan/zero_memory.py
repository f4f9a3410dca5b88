"""A rank of the memory test: two supervised updates of a model, and how far the memory rose above what the imports take.

`torchrun … -m tests.plan.zero_memory FOLDER`: in it case.json (model, zero, micro_tokens, rank of adapters or 0); each rank
leaves rank<n>.json.
"""

import json
import os
import sys
from pathlib import Path

import torch

from stages.engine import distributed
from stages.engine.adapters import adapted
from stages.engine.deepspeed_engine import Engine
from stages.engine.packing.pack import Text
from stages.engine.scorer import TokenScorer
from stages.engine.settings import Lora, Training
from stages.rollout.torch_engine import load_model
from stages.supervised.train import accumulate

DOCUMENT = 256
"""Computed tokens of a document, and predicted ones."""


def status(name: str) -> int:
    """Bytes that the kernel counts for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    folder = Path(sys.argv[1])
    case = json.loads((folder / "case.json").read_text())
    torch.manual_seed(0)
    distributed.join("cpu")
    torch.ones(8, 8) @ torch.ones(8, 8)
    baseline = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    model = load_model(Path(case["model"]))
    adapted(model, Lora(rank=case["rank"]) if case["rank"] else None, 0)
    vocabulary = model.config.vocab_size
    engine = Engine(TokenScorer(model), Training(lr=1e-6), case["zero"], "cpu")
    count = case["micro_tokens"] * distributed.size() // DOCUMENT
    ids = torch.randint(2, vocabulary, (count, DOCUMENT + 1), generator=torch.Generator().manual_seed(0)).tolist()
    documents = [Text(row[:1], row[1:]) for row in ids]
    peaks = {}
    for number in range(2):
        accumulate(engine, documents, case["micro_tokens"])
        peaks[f"accumulated {number}"] = status("VmHWM") - baseline
        engine.step(1e-6)
        peaks[f"stepped {number}"] = status("VmHWM") - baseline
    found = {"baseline": baseline, "peak": status("VmHWM") - baseline, "now": status("VmRSS") - baseline, **peaks}
    (folder / f"rank{distributed.number()}.json").write_text(json.dumps(found))
    distributed.barrier()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
