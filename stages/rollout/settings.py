"""Which engine samples, and how it runs. No torch here: a recipe is checked without it."""

from typing import Annotated, Literal

from pydantic import Field

from stages.contract.config import EXECUTION, Config, Expanded

Decoder = Literal["auto", "compiled", "torch", "transformers"]


class RolloutSettings(Config):
    """The engine that samples. The fields from `vllm_python` on are vLLM's alone."""

    engine: Literal["torch", "vllm"] = "torch"
    """`torch` samples with the trainer's own weights; `vllm` in a process of its own, which `make vllm` installs. They
    draw different answers from the same distribution."""
    tokens: Annotated[int, EXECUTION] = Field(default=32768, ge=1)
    """The torch engine's budget: tokens whose keys and values are held at once."""
    decoder: Annotated[Decoder, EXECUTION] = "auto"
    """How the torch engine takes a step of decoding: `compiled` by the machine's C++ compiler (a CPU, float32, Llama or Qwen;
    1.5 to 3 times as fast), `torch` by PyTorch alone, `transformers` by the model's own forward (slower; what other
    architectures have), `auto` the fastest that can be. They differ by rounding."""
    vllm_python: Annotated[Annotated[str, Expanded] | None, EXECUTION] = None
    """The interpreter of vLLM's own environment; null: the one of `make vllm`, .venv-vllm/bin/python in the clone."""
    memory_share: Annotated[float | None, EXECUTION] = Field(default=None, gt=0, lt=1)
    """On a GPU the share of its memory for vLLM's weights, keys and values (null: 0.3, for the trainer is there too; 0.9 with
    `own_gpu`); on a CPU the share of the machine's for keys and values, of all ranks together (null: 0.1)."""
    max_model_length: Annotated[int | None, EXECUTION] = Field(default=None, ge=1)
    """Longest prompt with its answer in tokens; null: what the model declares, if `memory_share` holds it."""
    weights: Annotated[Literal["file", "broadcast"], EXECUTION] = "file"
    """How vLLM gets the weights of the policy: through a safetensors `file` in shared memory, or by `broadcast` from memory to
    memory (NCCL on GPUs, where it wants `own_gpu`; gloo on CPUs)."""
    own_gpu: Annotated[bool, EXECUTION] = False
    """Whether in training each rank's vLLM has a GPU of its own, behind those of the trainer: with 4 processes GPUs 0 to 3
    train and 4 to 7 sample. Otherwise it shares its rank's."""
    sleep: Annotated[bool, EXECUTION] = False
    """Whether vLLM gives its GPU memory back while the update runs. On a CPU it has nothing to give back."""
    start_s: Annotated[float, EXECUTION] = Field(default=600.0, gt=0)
    """Seconds that vLLM may take to start (measured: 40 for 135 M parameters on 2 cores)."""
    silence_s: Annotated[float, EXECUTION] = Field(default=300.0, gt=0)
    """Seconds that vLLM may say nothing during a call (it speaks every second between two tokens); then it is ended."""
