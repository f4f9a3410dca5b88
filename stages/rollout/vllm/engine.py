"""vLLM as the engine that samples: faster where it has a GPU, in a process and an environment of its own.

Exact: the seed of every sample, and the weights that it is drawn with. Within rounding: log-probabilities. Other random numbers
are drawn than by the torch engine, from the same distribution.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import psutil
import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from stages.contract.errors import StageFailed, UserError
from stages.rollout.decoding.token_sampling import derived_seed
from stages.rollout.protocol import Completion, Done, Request, Sampling
from stages.rollout.settings import RolloutSettings
from stages.rollout.token_text import TokenText, end_tokens
from stages.rollout.vllm.client import MEND, VllmProcess
from stages.rollout.vllm.weight_broadcast import WeightsGroup, described, distinct

INTERPRETER = Path(__file__).resolve().parents[3] / ".venv-vllm" / "bin" / "python"
"""Where `make vllm` puts it."""
PROGRAM = Path(__file__).with_name("worker.py")
GPU_SHARE, OWN_GPU_SHARE, CPU_SHARE = 0.3, 0.9, 0.1
"""`memory_share` by default."""
COOLEST = 0.01
"""vLLM draws at no lower temperature, but greedily."""
_TORCHRUN = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class VllmRollout:
    """Samples with vLLM. Implements `stages.rollout.protocol.Rollout`.

    Under torchrun every rank that samples has its own, on the device of the rank (CUDA: written for, never run).
    """

    def __init__(
        self, folder: Path, tokenizer: Any, settings: RolloutSettings, *, device: str, log: Path, own_gpu: bool = False
    ) -> None:
        """Start it with the model of `folder`, without waiting. `device`: `cpu` or `cuda`; `log`: where vLLM's own words go;
        `own_gpu`: on a GPU behind those that the ranks of this machine train on.

        Raises UserError when there is no interpreter for it, or no such GPU.
        """
        self.tokenizer = tokenizer
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.end_tokens = _end_tokens(folder, config, tokenizer)
        self.text = TokenText(tokenizer, self.end_tokens)
        interpreter = Path(settings.vllm_python or INTERPRETER)
        if not interpreter.is_file():
            raise UserError("vLLM is not installed: no such interpreter", where=str(interpreter), mend=MEND)
        options = {"device": device, "engine": _engine_options(folder, config, settings, device, own_gpu=own_gpu)}
        # Isolated (-I): neither PYTHONPATH nor the folder of the program must bring packages of ours in.
        self._process = VllmProcess(
            [str(interpreter), "-I", str(PROGRAM), json.dumps(options)],
            log,
            start_s=settings.start_s,
            silence_s=settings.silence_s,
            environment=_environment(device, own_gpu=own_gpu),
        )
        self._silence_s = settings.silence_s
        self._group: WeightsGroup | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.close()

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Token ids of a prompt."""
        return tuple(self.text.prompt(prompt))

    def sample(
        self, requests: list[Request], sampling: Sampling, *, seed: int, purpose: str, step: int, done: Done | None = None
    ) -> list[list[Completion]]:
        """Answer every request; see the protocol.

        The log-probabilities are of the distribution that was drawn from: under the temperature and, with top_p < 1, after
        the cut. Raises UserError for what vLLM cannot sample, StageFailed when its process dies or falls silent.
        """
        self._check(requests, sampling)
        prompts = [
            {
                "ids": request.prompt_ids,
                "seeds": [
                    derived_seed(seed, purpose, step, request.key, request.first_sample + n) for n in range(request.samples)
                ],
            }
            for request in requests
        ]
        answers = [[Completion() for _ in range(request.samples)] for request in requests]
        asked = {
            "do": "sample",
            "prompts": prompts,
            **sampling.model_dump(mode="json"),
            "end_tokens": sorted(self.end_tokens),
        }
        left = [request.samples for request in requests]
        for reply in self._process.ask(asked):
            number, ids = reply["prompt"], reply["ids"]
            if not ids or reply["finish"] not in ("stop", "length"):
                raise StageFailed("vLLM left an answer unfinished")
            text = self.text.decode(ids)
            answers[number][reply["sample"]] = Completion(ids, reply["logprobs"], text, reply["finish"])
            left[number] -= 1
            if not left[number] and done is not None:
                done(number, answers[number])
        if any(left):
            raise StageFailed("vLLM left an answer unfinished")
        return answers

    def load_weights(self, folder: Path) -> None:
        """Sample with the weights of `folder` (safetensors, of the same architecture) from now on; wakes it."""
        self._do({"do": "load", "folder": str(folder)})

    def send_weights(self, weights: Iterable[tuple[str, Tensor]], device: torch.device) -> None:
        """Sample with these weights (names as in safetensors) from now on; wakes it. They go through no file.

        Raises StageFailed when vLLM's end is gone or stays away for `silence_s`.
        """
        sent = distinct(list(weights))
        try:
            if self._group is None:
                join = {"do": "join", "seconds": self._silence_s}
                self._group = WeightsGroup(
                    device, self._silence_s, lambda file: self._process.begin({**join, "file": str(file)})
                )
                self._nothing_more("join")
            self._process.begin({"do": "receive", "weights": described(sent)})
            self._group.send(sent)
        except RuntimeError as error:
            self._process.fail(f"the weights could not be sent to vLLM ({error})")
        self._nothing_more("receive")

    def sleep(self) -> None:
        """Give GPU memory back, weights included, until the next `load_weights` (CUDA: written for, never run)."""
        self._do({"do": "sleep"})

    def _do(self, request: dict[str, Any]) -> None:
        self._process.begin(request)
        self._nothing_more(request["do"])

    def _nothing_more(self, asked: str) -> None:
        for reply in self._process.replies():
            raise StageFailed(f"vLLM answered `{asked}` with `{str(reply)[:80]}`")

    def _check(self, requests: list[Request], sampling: Sampling) -> None:
        if 0 < sampling.temperature < COOLEST:
            mend = f"use 0 or at least {COOLEST:g}, or `rollout.engine: torch`"
            raise UserError(f"vLLM does not draw at {sampling.temperature:g}", where="sampling.temperature", mend=mend)
        for request in requests:
            if not request.prompt_ids:
                raise UserError(f"the prompt of `{request.key}` is empty", where="template", mend="write a template")
        longest = max((len(request.prompt_ids) for request in requests), default=0) + sampling.max_tokens
        if longest > (room := self._process.ready()["max_model_length"]):
            what = f"prompt and answer may have {longest} tokens, vLLM was given room for {room}"
            mend = "make it smaller, or `rollout.max_model_length` larger if the model allows"
            raise UserError(what, where="sampling.max_tokens", mend=mend)


def _engine_options(folder: Path, config: Any, settings: RolloutSettings, device: str, *, own_gpu: bool) -> dict[str, Any]:
    """Arguments of `vllm.LLM`."""
    options: dict[str, Any] = {
        "model": str(folder.absolute()),
        # As the trainer has it: vLLM's `auto` would make float32 a 16-bit type.
        "dtype": str(config.dtype).removeprefix("torch."),
        "max_model_len": settings.max_model_length or -1,  # the model's, if there is memory for it
        "trust_remote_code": False,
        "generation_config": "vllm",  # no sampling defaults of the model's
        "logprobs_mode": "processed_logprobs",  # under the temperature
        "disable_log_stats": True,
        "seed": 0,
    }
    if device == "cpu":
        share = (settings.memory_share or CPU_SHARE) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        # Compiling takes longer than a CPU's rollouts gain.
        return options | {"enforce_eager": True, "kv_cache_memory_bytes": int(psutil.virtual_memory().total * share)}
    return options | {
        "gpu_memory_utilization": settings.memory_share or (OWN_GPU_SHARE if own_gpu else GPU_SHARE),
        "enable_sleep_mode": settings.sleep,
    }


def _environment(device: str, *, own_gpu: bool) -> dict[str, str]:
    """The environment of this process without what torchrun tells a rank: vLLM would take itself for a part of that group."""
    kept = {k: v for k, v in os.environ.items() if k not in _TORCHRUN and not k.startswith("TORCHELASTIC_")}
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0")) + (int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if own_gpu else 0)
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        if visible and local >= len(visible):
            mend = "make more GPUs visible, or train on fewer (`compute.processes`)"
            raise UserError(
                f"{len(visible)} GPUs are visible, this rank's vLLM wants number {local}", where="rollout.own_gpu", mend=mend
            )
        kept["CUDA_VISIBLE_DEVICES"] = visible[local] if visible else str(local)
    return kept


def _end_tokens(folder: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """Every declared end token, as the torch engine finds them, without loading the model."""
    written = (folder / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(folder, local_files_only=True) if written else GenerationConfig()
    return end_tokens(SimpleNamespace(generation_config=generation, config=config), tokenizer)
