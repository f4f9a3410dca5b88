"""GRPO: whole answers scored against their group, no value model (DeepSeekMath, arXiv 2402.03300; DeepSeek-R1, 2501.12948)."""
