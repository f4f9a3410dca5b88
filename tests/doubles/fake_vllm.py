"""Stands for vLLM's process and misbehaves as its argument says."""

import json
import os
import signal
import sys
import time
from pathlib import Path


def tell(reply):
    print(json.dumps(reply), flush=True)


def main():
    manner = sys.argv[-1] if sys.argv[-1].isidentifier() else "well"
    if manner == "unfit":
        return tell({"unfit": "ModuleNotFoundError: No module named 'vllm'"})
    if manner == "silent":
        time.sleep(60)
    if manner == "dies":
        print("first\nRuntimeError: boom", file=sys.stderr)
        sys.exit(7)
    tell({"ready": {"max_model_length": 20}})
    if manner == "deaf":
        os.kill(os.getpid(), signal.SIGSTOP)
    if manner == "stays":
        sys.stdin.close()
        time.sleep(60)
    for line in sys.stdin:
        if manner == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if manner == "hangs":
            tell({"alive": True})
            time.sleep(60)
        if manner == "garbage":
            print("Segmentation \xff", flush=True)
        request = json.loads(line)
        if request["do"] == "load":
            Path(request["folder"]).joinpath("model.safetensors").read_text()
        for number, prompt in enumerate(request.get("prompts", [])):
            for sample in reversed(range(len(prompt["seeds"]))):
                tell({"alive": True})
                ids = [6 + sample, *request["end_tokens"]]
                tell({"prompt": number, "sample": sample, "ids": ids, "logprobs": [-1.0, -0.5], "finish": "stop"})
        tell({"done": True})
    return None


if __name__ == "__main__":
    main()
