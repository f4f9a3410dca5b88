"""Evaluation: lm-eval over our own rollout, and the statistics of sampled answers. The only package that imports lm_eval."""
