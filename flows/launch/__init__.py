"""One attempt of a stage: started here, by Slurm or by Kubernetes, watched, and ended."""
