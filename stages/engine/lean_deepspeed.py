"""DeepSpeed as this project takes it: without what it would import or compile for parts that are not used here."""

import sys
import types

if "mlflow" in sys.modules:
    import deepspeed
else:
    # Its autotuner imports MLflow where there is one, which takes longer than all the rest of DeepSpeed. None is Python's way
    # to say that there is no such module.
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed
    finally:
        del sys.modules["mlflow"]

# It would compile this op on a machine's first run, which takes a minute and a compiler. Only its inference all-reduce uses
# it, and training never calls that.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# Its own Muon, which it imports to ask whether an optimizer is one: that brings PyTorch's compiler along, 1.3 s in every rank.
# (Ours is in `muon.py`; a DeepSpeed file cannot name an optimizer.)
for _name in ("muon_optimizer", "original_muon"):
    _module = types.ModuleType(f"deepspeed.runtime.zero.muon.{_name}", "In place of DeepSpeed's.")
    vars(_module).update(MuonWithAuxAdam=type("MuonWithAuxAdam", (), {}), muon_update=None)
    sys.modules.setdefault(_module.__name__, _module)

__all__ = ["deepspeed"]
