"""What can be known of a run before anything is computed: data, prompts, rewards, tasks, settings, models, this machine.

`r1 run`, `resume` and `deploy` stop at the first failed check; `r1 plan` and `r1 doctor CONFIG` show all findings. Nothing
heavy (torch, transformers, lm-eval) is imported; user code runs in the verifiers' processes alone.
"""
