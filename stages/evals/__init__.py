"""Evaluation: lm-eval over our own rollout, and the statistics of sampled answers. The only room that imports lm_eval."""
