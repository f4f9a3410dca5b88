"""DeepSpeed as this project takes it: without what it would import or compile for parts that are not used here."""

import sys

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

__all__ = ["deepspeed"]
