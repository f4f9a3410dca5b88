"""Sequences decoded side by side by a model's own forward, in one of the ways that transformers models allow.

The inputs of a pass are made by the model itself (`prepare_inputs_for_generation` and what belongs to it, which knows how its
cache is made and called). Only the padded mode puts anything into a text: in the others the rows of a batch have one length,
and the model sees what it would see of each text alone.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.generation.utils import ALL_CACHE_NAMES


@dataclass(frozen=True)
class Mode:
    """How a model is decoded."""

    padded: bool
    """Whether prompts of unequal lengths share a batch, padded at the left."""
    cache: Literal["shared", "rows", "none"]
    """`shared`: rows of the cache can be repeated and dropped; `rows`: it stays as the prompts filled it; `none`: the whole
    text goes through the model for every token."""

    def __str__(self) -> str:
        batches = "padded batches" if self.padded else "batches of equal prompt length"
        return f"{batches} without a cache" if self.cache == "none" else f"{batches} with the model's cache"


MODES = (Mode(True, "shared"), Mode(False, "shared"), Mode(False, "rows"), Mode(False, "none"))
"""From the fastest to the one that every causal model has."""


FAILURES = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a model's code raises where it was not written for a call."""


class UnsupportedByModel(Exception):
    """A model's own code failed, in a mode or with inputs that it was not written for."""


@contextmanager
def model_code() -> Iterator[None]:
    """Turn what a model's code raises into `UnsupportedByModel`, but not running out of memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        lines = str(error).strip().splitlines()
        raise UnsupportedByModel(": ".join([type(error).__name__, *(line[:160] for line in lines[:1])])) from error


def parameters_of(model: Any) -> frozenset[str]:
    """Names of the parameters of a model's forward."""
    return frozenset(inspect.signature(model.forward).parameters)


def own_logits(model: Any, ids: Tensor) -> Tensor:
    """(R, T, V) the logits of a model's own forward on (R, T) token ids: no padding, no mask, no cache."""
    options = {"use_cache": False} if "use_cache" in parameters_of(model) else {}
    with model_code():
        logits: Tensor = model(input_ids=ids, return_dict=True, **options).logits
    return logits


class TransformersBatch:
    """R sequences that grow by a token at a time. `logits`: (R, V), of the next token of each."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], sequences: Sequence[int], mode: Mode) -> None:
        """Run the prompts through the model.

        Args:
            model: a causal language model of transformers in evaluation mode.
            prompts: distinct prompts; of one length unless the mode pads.
            sequences: for each of the R sequences the index of its prompt.
            mode: how; a model that it does not fit may give other logits, or raise `UnsupportedByModel` here or later.

        """
        self._model, self._mode = model, mode
        device = next(model.parameters()).device
        index = torch.tensor(sequences, device=device)
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        assert mode.padded or bool(mask.all()), "only padded batches take prompts of unequal lengths"
        if mode.cache == "rows":  # nothing can be repeated later
            ids, mask, index = ids[index], mask[index], torch.arange(len(index), device=device)
        self._ids = ids
        self._options = self._first_options(mask)
        self.logits = self._forward(first=True)
        if mode.cache != "rows":
            self.keep(index)

    @property
    def can_drop(self) -> bool:
        """Whether `keep` works."""
        return self._mode.cache != "rows"

    def append(self, tokens: Tensor) -> Tensor:
        """Append (R,) tokens, one to each sequence, and return the new `logits`."""
        self._ids = torch.cat([self._ids, tokens[:, None]], dim=-1)
        self.logits = self._forward()
        return self.logits

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, in this order; a row may be named twice."""
        assert self.can_drop, "this cache cannot be repeated or cut"
        before = len(self._ids)
        self._ids, self.logits = self._ids[rows], self.logits[rows]
        for name, value in self._options.items():
            if name in ALL_CACHE_NAMES:
                if not isinstance(value, Cache):
                    raise UnsupportedByModel(f"its cache ({type(value).__name__}) has no rows to choose from")
                with model_code():
                    value.reorder_cache(rows)
            elif isinstance(value, Tensor):
                # A mask or positions, which may have a dimension for kinds of rotary positions before that of the rows.
                assert value.shape[-2] == before, f"`{name}` has shape {tuple(value.shape)} for {before} rows"
                self._options[name] = value.index_select(value.dim() - 2, rows)

    @cached_property
    def _last_only(self) -> dict[str, int]:
        return {"logits_to_keep": 1} if "logits_to_keep" in parameters_of(self._model) else {}

    def _first_options(self, mask: Tensor) -> dict[str, Any]:
        """What transformers' own `generate` hands from pass to pass, before the first."""
        if self._mode.cache == "none":
            return {}
        options: dict[str, Any] = {"use_cache": True, **self._last_only}
        rows, width = self._ids.shape
        with model_code():
            if self._mode.padded:
                options["attention_mask"] = mask
                if "position_ids" in parameters_of(self._model):
                    options["position_ids"] = self._model._prepare_position_ids_for_generation(self._ids, options)
            self._model._prepare_cache_for_generation(GenerationConfig(), options, GenerationMode.SAMPLE, rows, width)
        return options

    def _forward(self, *, first: bool = False) -> Tensor:
        """(R, V) the logits behind the last tokens."""
        if self._mode.cache == "none":
            options = {"use_cache": False} if "use_cache" in parameters_of(self._model) else {}
            with model_code():
                output = self._model(input_ids=self._ids, return_dict=True, **options, **self._last_only)
        else:
            with model_code():
                inputs = self._model.prepare_inputs_for_generation(
                    self._ids, next_sequence_length=None if first else 1, is_first_iteration=first, **self._options
                )
                output = self._model(**inputs, return_dict=True)
                self._options = self._model._update_model_kwargs_for_generation(output, self._options)
            if all(self._options.get(name) is None for name in ALL_CACHE_NAMES):
                raise UnsupportedByModel("it hands no cache on")
        logits: Tensor = output.logits
        return logits[:, -1]
