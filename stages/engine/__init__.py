"""Training under DeepSpeed: packed texts, log-probabilities, steps, checkpoints. The only package that imports deepspeed."""
