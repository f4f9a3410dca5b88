"""Training under DeepSpeed: rows of tokens, log-probabilities, steps, checkpoints. The only room that imports deepspeed."""
