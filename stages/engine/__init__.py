"""Training under DeepSpeed: packed texts, log-probabilities, steps, checkpoints. The only room that imports deepspeed."""
