"""DeepSpeed, reduced to what a training loop needs: accumulate, step, gather weights, save, restore.

What DeepSpeed does that one has to know: `backward` divides by the configured accumulation and averages over ranks, so here the
accumulation is 1, the boundary is set by hand, and a loss is multiplied by the number of ranks; the caller's loss is already
divided by the *global* count, so the gradient is the same for every cut into micro-batches and ranks. Every rank must make the
same passes: `equalise` sees to it.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from stages.contract.errors import UserError
from stages.engine import distributed
from stages.engine.adapter_folder import write_adapter
from stages.engine.adapters import base_weights, is_adapted, plain_weights, same_shape
from stages.engine.checkpoint.state import read_state, write_state
from stages.engine.deepspeed_file import merge as merge_settings
from stages.engine.deepspeed_file import stage_training
from stages.engine.lean_deepspeed import deepspeed
from stages.engine.muon import Muon
from stages.engine.packing.pack import Packed, Text, TrainingPath, alone, micro_batches, row, rows
from stages.engine.scorer import Scorer, chunks_for
from stages.engine.settings import Training, deepspeed_file, deepspeed_settings
from stages.runtime import heartbeat
from stages.runtime.clock import clock

BUCKET = 2**22
"""Entries of gradients after which ranks sum what has come together, where each has them whole; a larger weight is not cut."""


class Engine:
    """A model under DeepSpeed."""

    def __init__(self, scorer: Scorer, optimizer: Training, zero: str, device: str, *, muon: bool = False) -> None:
        """Hand `scorer` to DeepSpeed. `zero` names the settings (`zero0` to `zero3`, or a JSON file).

        muon: Muon instead of AdamW for the matrices of hidden layers; ZeRO 0 only, as it needs whole matrices.
        """
        distributed.join(device)
        self.settings = optimizer
        self.device = distributed.local_device(device)
        scorer.model.config.use_cache = False  # type: ignore[union-attr]
        # Dropout stays off: sampler, trainer and reference must mean one policy, and no checkpoint holds its random numbers.
        scorer.to(self.device).eval()
        scorer.probe()
        if optimizer.gradient_checkpointing:
            scorer.recompute()
        parameters = [p for p in scorer.parameters() if p.requires_grad]
        settings: dict[str, Any] = {
            "lr": optimizer.lr,
            "betas": optimizer.betas,
            "weight_decay": optimizer.weight_decay,
            "fused": True,
        }
        update = Muon(scorer.model, **settings) if muon else torch.optim.AdamW(parameters, **settings)
        # Adapters are float32 beside weights of 16 bits: to DeepSpeed, which would cast them, it is float32 training.
        bf16 = all(p.dtype == torch.bfloat16 for p in parameters)
        file = self._settings(zero, scorer, torch.bfloat16 if bf16 else torch.float32)
        if bf16:
            file = _in_float32(file)
        self.zero_stage = int(file.get("zero_optimization", {}).get("stage", 0))
        file |= {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optimizer.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": bf16, "immediate_grad_update": True},
            "steps_per_print": 10**9,
        }
        try:
            self.engine, *_ = deepspeed.initialize(model=scorer, optimizer=update, config=file, dist_init_required=False)
        except ValidationError as error:  # a value that its section cannot have
            first = error.errors()[0]
            what = f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}"
            raise UserError(what, where=str(deepspeed_file(zero)), mend="correct the value there") from error
        self.world_size, self.rank = distributed.size(), distributed.number()
        self._whole_gradients = self.zero_stage == 0 or (bf16 and self.zero_stage == 1)
        if self._whole_gradients:
            # It would copy all gradients into one array and back, even alone: `accumulate` has it done in parts.
            self.engine.enable_backward_allreduce = False
        self._copy: nn.Module | None = None
        self.path: TrainingPath = "packed"
        """How texts reach the model; `self_check` decides."""

    def _settings(self, zero: str, scorer: Scorer, dtype: torch.dtype) -> dict[str, Any]:
        """The file's settings, "auto" filled in; what of it has no effect goes to the log."""
        width = getattr(scorer.model.config, "hidden_size", None)
        stage = stage_training(
            self.settings,
            dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
            on_cpu=self.device.type == "cpu",
            hidden=width if isinstance(width, int) else None,
        )
        merged = merge_settings(deepspeed_settings(zero), stage, str(deepspeed_file(zero)))
        for warning in merged.warnings if distributed.number() == 0 else ():
            print(f"warning: {deepspeed_file(zero)}: {warning}", file=sys.stderr)
        return merged.settings

    @property
    def model(self) -> Any:
        """The Hugging Face model (its weights are shards under ZeRO-3)."""
        return self.engine.module.model

    @property
    def scorer(self) -> Scorer:
        """The module that DeepSpeed trains."""
        scorer: Scorer = self.engine.module
        return scorer

    def score(self, packed: Packed, temperature: float = 1.0, *, own: bool = False) -> tuple[Tensor, ...]:
        """What the scorer says of packed texts or a row, with gradient where enabled; `own`: see TokenScorer."""
        heartbeat.progress()
        with clock.span("forward"):
            scored: tuple[Tensor, ...] = self.engine(packed.to(self.device), temperature, **({"own": True} if own else {}))
        return scored

    def adopt(self, other: "Engine") -> None:
        """Take the path of another engine of the same architecture, which was checked."""
        self.scorer.adopt(other.scorer)
        self.path = other.path

    def micro_batches(self, texts: Sequence[Text], tokens: int) -> list[Packed]:
        """Cut out this rank's micro-batches of `texts`: packed ones of about `tokens` tokens, and rows. `owner` counts `texts`.

        On the path `packed` only texts longer than the model's window are rows.
        """
        long = [n for n, text in enumerate(texts) if self._is_row(text)]
        if not long:
            return micro_batches(texts, tokens, self.rank, self.world_size)
        short = [n for n in range(len(texts)) if n not in set(long)]
        packed = micro_batches([texts[n] for n in short], tokens, self.rank, self.world_size) if short else []
        numbers = torch.tensor(short)
        packed = [replace(batch, owner=numbers[batch.owner]) for batch in packed]
        return packed + rows([texts[n] for n in long], self.rank, self.world_size, long)

    def alone(self, texts: Sequence[Text]) -> list[Packed]:
        """One text a micro-batch, as the path has it."""
        return [row([text], [n]) if self._is_row(text) else alone([text])[0] for n, text in enumerate(texts)]

    def _is_row(self, text: Text) -> bool:
        window = self.scorer.window
        long = window is not None and len(text.prompt) + len(text.completion) - 1 > window
        return self.path == "rows" or long

    def equalise(self, mine: list[Packed], filler: Text) -> list[Packed]:
        """The micro-batches of this rank, filled up with weightless ones, so that all ranks make the same passes.

        The n-th micro-batch of every rank goes through the head in equally many chunks. `filler`: any text.
        """
        counts = distributed.gather([chunks_for(len(packed.targets)) for packed in mine])
        needed = max(map(len, counts))
        filled = mine + [self.alone([filler])[0] for _ in range(needed - len(mine))]
        for index, packed in enumerate(filled):
            packed.chunks = max(c[index] for c in counts if index < len(c))
        return filled

    def accumulate(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        """Add the gradients of losses, each already divided by the global count and computed just before its backward."""
        for index, loss in enumerate(losses):
            self.engine.set_gradient_accumulation_boundary(index == len(losses) - 1)
            with self._in_fixed_order():
                with clock.span("forward"):
                    scaled = loss() * self.world_size
                with clock.span("backward"):
                    self.engine.backward(scaled, scale_wrt_gas=False)
        if self._whole_gradients and self.world_size > 1:
            with clock.span("backward"):
                self.engine.allreduce_gradients(bucket_size=BUCKET)

    @contextlib.contextmanager
    def _in_fixed_order(self) -> Iterator[None]:
        """Sums in the same order at every run. Only for gradients: elsewhere no two summands meet, and it would cost time.

        Raises UserError where a GPU cannot.
        """
        if self.device.type != "cuda" or not self.settings.deterministic:
            yield
            return
        torch.use_deterministic_algorithms(True)
        try:
            yield
        except RuntimeError as error:
            if "does not have a deterministic implementation" not in str(error):
                raise
            what = str(error).split(",")[0].split(". ")[0]
            raise UserError(what, where="deterministic", mend="set it to false for this stage") from error
        finally:
            torch.use_deterministic_algorithms(False)

    def step(self, lr: float) -> float:
        """Clip, update, forget the gradients; returns the gradient's global norm before clipping."""
        with clock.span("optimizer"):
            for group in self.engine.optimizer.param_groups:
                group["lr"] = lr
            # Without ZeRO, DeepSpeed clips without saying what the norm was; the gradients are whole on every rank then.
            norm = (
                nn.utils.get_total_norm([p.grad for p in self.engine.module.parameters() if p.grad is not None])
                if self.zero_stage == 0
                else None
            )
            self.engine.step()
            return float(norm if norm is not None else self.engine.get_global_grad_norm() or 0.0)

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[Any]:
        """The model with its whole weights, for reading. Under ZeRO-3 they are gathered on every rank for the while."""
        if self.zero_stage < 3:
            yield self.model
            return
        with deepspeed.zero.GatheredParameters(list(self.model.parameters()), modifier_rank=None):
            yield self.model

    def sampling_model(self, *, apart: bool = False) -> Any:
        """A model with the current weights that can sample, adapters in place; a copy under ZeRO-3 or `apart`, fresh each time.

        Sampling takes hundreds of forward passes, and ranks need not make equally many: with sharded weights that would hang.
        apart: updates must not reach it.
        """
        if self.zero_stage < 3 and not apart:
            return self.model
        with clock.span("weights"):
            if self._copy is None:
                self._copy = same_shape(self.model).to(self.device)
            self.copy_weights(self._copy)
            return self._copy

    def copy_weights(self, model: nn.Module) -> None:
        """Give `model`, of the same architecture and with the same adapters, the current weights. Every rank calls it."""
        targets = dict(model.named_parameters())
        with self.whole_weights() as source, torch.no_grad():
            for name, weight in source.named_parameters():
                targets.pop(name).copy_(weight)
        assert not targets, f"no weights for {sorted(targets)}"

    def save_model(self, folder: Path, tokenizer: Any, main: bool, *, merge: torch.dtype | None = None) -> None:
        """Write a Hugging Face model folder. Every rank calls it; rank 0 (`main`) writes.

        Adapters are written beside the unchanged weights (adapter_folder.py); with `merge` they are added to the weights, which
        are written in that number format. A model without adapters is written as it is.
        """
        with self.whole_weights() as model:
            if main:
                if not is_adapted(model):
                    merge = None
                weights = base_weights(model) if merge is None else plain_weights(model, merge)
                state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights}
                model.save_pretrained(folder, state_dict=state, safe_serialization=True)
                config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
                config["use_cache"] = True
                if merge is not None:
                    config["dtype"] = str(merge).removeprefix("torch.")
                (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
                if merge is None:
                    write_adapter(model, folder)
                tokenizer.save_pretrained(folder)
        distributed.barrier()

    def state(self) -> dict[str, Tensor]:
        """The share of this rank of all that the next step depends on, copied to the CPU. Every rank calls it."""
        return read_state(self.engine, self.rank, self.world_size)

    def restore(self, stored: Callable[[str], Tensor]) -> None:
        """Take the state from a checkpoint, whatever ZeRO stage and number of ranks wrote it. Every rank calls it."""
        write_state(self.engine, stored)


def _in_float32(file: dict[str, Any]) -> dict[str, Any]:
    """Settings that sum gradients of bfloat16 weights in float32, in a process and over processes, unless `file` says else.

    In their own 8 bits a sum of hundreds of micro-batches loses a third of itself. DeepSpeed has no such sum without ZeRO, so
    it is ZeRO 1 there: the same arithmetic, with AdamW's state spread over the processes.
    """
    zero = file.get("zero_optimization", {})
    sums = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return sums | file | {"zero_optimization": zero | {"stage": zero.get("stage", 0) or 1}}
