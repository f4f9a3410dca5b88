"""The example that each command's `--help` ends with."""

EXAMPLES = {
    "run": "r1 run configs/quickstart.yaml --set stages.zero.lr=1e-4",
    "resume": "r1 resume latest",
    "stage": "r1 stage reasoning configs/quickstart.yaml --fresh",
    "join": "r1 join latest --node-rank 1",
    "plan": "r1 plan configs/qwen2.5-7b-8gpu.yaml --gpu h100",
    "status": "r1 status latest",
    "compare": "r1 compare quickstart-20260101-1 quickstart-20260101-2",
    "study": "r1 study configs/studies/variants.yaml --parallel 2",
    "report": "r1 report latest",
    "up": "r1 up --mlflow-port 5001",
    "down": "r1 down",
    "deploy": "r1 deploy configs/quickstart.yaml --cron '0 3 * * *'",
    "worker": "r1 worker",
    "rollouts": "r1 rollouts latest zero --last 1 --verdict wrong",
    "sample": "r1 sample latest reasoning '4*3+2*6=?' --samples 2",
    "export": "r1 export latest reasoning my-model",
    "gc": "r1 gc --checkpoints --older-than 7d",
    "pin": "r1 pin latest",
    "unpin": "r1 unpin latest",
    "doctor": "r1 doctor configs/qwen2.5-1.5b.yaml",
    "completion": "r1 completion bash > ~/.local/share/bash-completion/completions/r1",
    "schema": "r1 schema --json > r1.schema.json",
}
"""Command -> one line that works."""
