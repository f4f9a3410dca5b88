"""vLLM's own process, run by the interpreter of its own environment: it samples for a stage over its standard input and output.

vLLM and Prefect want packages that exclude each other, so this file imports nothing of `stages`, and nothing else imports vLLM.
One JSON document a line; the first argument has the options. It says `{"ready": {…}}` or `{"unfit": reason}`, then answers:

    {"do": "sample", "prompts": [{"ids", "seeds"}], "temperature", "top_p", "max_tokens", "stop", "end_tokens"}
        -> {"prompt", "sample", "ids", "logprobs", "finish"} as each answer ends, {"alive": true} every second meanwhile
    {"do": "load", "folder"}     new weights in place, from safetensors; wakes it
    {"do": "join", "file", "seconds"}    meet the trainer in a group of two (weight_broadcast.py)
    {"do": "receive", "weights": [[name, type, shape]]}    new weights in place, as the group brings them; wakes it
    {"do": "sleep"}              gives GPU memory back until the next weights

and closes each of them with {"done": true}. An error ends the process, with its traceback on standard error. So does the end of
its input or of its parent, at once, whatever it is at.
"""

import json
import os
import queue
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

Tell = Callable[[dict[str, Any]], None]
TELL_S = 1.0
"""Seconds between signs of life while it samples."""


def main() -> None:
    """Load the model once, then serve."""
    parent = os.getppid()
    # A stage that is asked to stop still needs its answers; it ends this process by closing the pipe.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    requests, replies = _own_pipe()
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests, parent, inbox), daemon=True).start()

    def tell(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply).encode() + b"\n")

    options = json.loads(sys.argv[1])
    os.environ.update(
        # The engine in this very process: one process to end, and one that cannot be left behind.
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
    )
    if options["device"] == "cpu":
        # What is compiled for eager sampling saves nothing on a CPU, and costs some 20 s at the first answer.
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
    try:
        from vllm import LLM
    except ImportError as error:
        tell({"unfit": f"{type(error).__name__}: {error}"})
        return
    llm = LLM(**options["engine"])
    tell({"ready": {"max_model_length": llm.llm_engine.model_config.max_model_len}})
    asleep, cpu = False, options["device"] == "cpu"
    while True:
        request = json.loads(inbox.get())
        if request["do"] == "sample":
            _sample(llm, request, tell)
        elif request["do"] == "load":
            _load(llm, "reload_weights", {"weights_path": request["folder"]}, asleep=asleep, cpu=cpu)
            asleep = False
        elif request["do"] == "join":
            llm.collective_rpc(_join, args=(request["file"], request["seconds"]))
        elif request["do"] == "receive":
            _load(llm, _receive, {"weights": request["weights"]}, asleep=asleep, cpu=cpu)
            asleep = False
        elif request["do"] == "sleep":
            llm.sleep(level=2)  # the weights need not be kept: the next ones come from the trainer
            asleep = True
        else:
            raise ValueError(f"unknown request: {request['do']}")
        tell({"done": True})


def _own_pipe() -> tuple[int, Any]:
    """The two ends of the protocol, which whatever else prints or reads here cannot touch."""
    requests, replies = os.dup(0), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return requests, replies


def _listen(requests: int, parent: int, inbox: queue.SimpleQueue[bytes]) -> None:
    """Hand on the lines of the input; end the process when it closes, or when the parent is gone."""
    buffer = b""
    while True:
        readable = select.select([requests], [], [], 1.0)[0]
        part = os.read(requests, 1 << 16) if readable else None
        if part == b"" or os.getppid() != parent:  # the second where another process holds the pipe open
            os._exit(0)
        *lines, buffer = (buffer + (part or b"")).split(b"\n")
        for line in lines:
            inbox.put(line)


def _sample(llm: Any, request: dict[str, Any], tell: Tell) -> None:
    """Answer every prompt once per seed. vLLM keeps a random generator for each request that has a seed."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    for number, prompt in enumerate(request["prompts"]):
        for sample, seed in enumerate(prompt["seeds"]):
            params = SamplingParams(
                temperature=request["temperature"],
                top_p=request["top_p"],
                max_tokens=request["max_tokens"],
                seed=seed,
                stop=request["stop"],
                include_stop_str_in_output=True,
                detokenize=bool(request["stop"]),
                # Stop texts are looked for in what the trainer's side decodes: a tag may be a special token.
                skip_special_tokens=False,
                spaces_between_special_tokens=False,
                # The end tokens are those we name, and no others.
                stop_token_ids=request["end_tokens"],
                ignore_eos=True,
                logprobs=0,  # of the drawn token alone
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(f"{number}/{sample}", {"prompt_token_ids": prompt["ids"]}, params)
    told = time.monotonic()
    while engine.has_unfinished_requests():
        for output in engine.step():
            number, sample = map(int, output.request_id.split("/"))
            answer = output.outputs[0]
            ids = list(answer.token_ids)
            logprobs = [found[token].logprob for token, found in zip(ids, answer.logprobs, strict=True)]
            tell({"prompt": number, "sample": sample, "ids": ids, "logprobs": logprobs, "finish": answer.finish_reason})
        if time.monotonic() - told >= TELL_S:
            tell({"alive": True})
            told = time.monotonic()


def _load(llm: Any, how: str | Callable[..., None], given: dict[str, Any], *, asleep: bool, cpu: bool) -> None:
    """Put new weights in place of the present ones, and forget the keys and values of the old. `how`: done by the worker."""
    if asleep:
        llm.wake_up(tags=["weights"])
    llm.collective_rpc(how, kwargs=given)
    if cpu:
        llm.apply_model(_pack_head)
    if asleep:
        llm.wake_up(tags=["kv_cache"])
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM still holds keys and values of the old weights")


def _join(worker: Any, file: str, seconds: float) -> None:
    """Become rank 1 of the group in which the trainer is 0."""
    import torch
    import torch.distributed as dist

    store, timeout = dist.FileStore(file, 2), timedelta(seconds=seconds)  # type: ignore[attr-defined]
    if worker.device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        worker.r1_group = dist.ProcessGroupNCCL(store, 1, 2, options)
    else:
        worker.r1_group = dist.ProcessGroupGloo(store, 1, 2, timeout)
    worker.r1_group.broadcast(torch.zeros(1, device=worker.device), 0).wait()


def _receive(worker: Any, weights: list[tuple[str, str, list[int]]]) -> None:
    """Load the weights one by one as the trainer sends them, in its order: one of them at a time is held twice."""
    import torch

    def arriving() -> Iterator[tuple[str, Any]]:
        for name, kind, shape in weights:
            tensor = torch.empty(shape, dtype=getattr(torch, kind), device=worker.device)
            worker.r1_group.broadcast(tensor, 0).wait()
            yield name, tensor

    worker.reload_weights(weights_iterator=arriving())


def _pack_head(model: Any) -> None:
    """Pack the output head again. On a CPU it multiplies by a packed copy of its weights, and where these are the embedding's
    (tied), vLLM 0.32 puts the new ones into the embedding and leaves the copy as it was: half old, half new, without a word.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


if __name__ == "__main__":
    main()
