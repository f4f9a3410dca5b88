"""A run: Prefect's flow, its stage tasks, their order, and what is said meanwhile."""
