"""What `megaray export` converts: found, and checked before anything heavy is imported or started."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rlhf.config import Config
from rlhf.engine_options import check_engine_options
from rlhf.heads import converted_head
from rlhf.layout_check import check_layout
from rlhf.megatron_folder import MEGATRON, adapter_of, check_described, find_megatron, holds_megatron
from rlhf.model_folder import check_files, local_model, read_shape
from rlhf.output_check import check_writable
from rlhf.pipeline import policy_pipeline
from rlhf.resolution import lasting_folder, trainable_dtype

Conversion = Literal["to_mcore", "to_hf", "merge_lora", "compare"]
SUFFIXES = {"to_mcore": "mcore", "to_hf": "hf", "merge_lora": "merged"}  # of output_dir when it is not given
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def conversion(config: Config) -> Conversion:
    """What the options ask for. Raises ValueError when that is nothing, or two things at a time."""
    if config.to_mcore and config.to_hf:
        raise ValueError("give --to_mcore or --to_hf, not both: they are opposite directions")
    if config.to_mcore:
        _require(config.mcore_model is None, "--to_mcore writes a Megatron checkpoint, and --mcore_model is one: give --model")
        _require(config.model is not None, "--to_mcore needs --model: a Hugging Face folder, or a hub id")
    if config.to_hf:
        _require(config.mcore_model is not None, "--to_hf needs --mcore_model: the folder with the Megatron checkpoint")
        _require(config.merge_lora is not False, "--to_hf merges an adapter into its base: leave out --merge_lora false")
    if config.adapters:
        other = "to_mcore" if config.to_mcore else "mcore_model" if config.mcore_model is not None else None
        _require(other is None, f"--adapters and --{other}: merge the adapter first (--merge_lora true), then convert the result")
        _require(len(config.adapters) == 1, f"--adapters takes one folder here, got {len(config.adapters)}")
        _require(bool(config.merge_lora), "--adapters alone asks for nothing: add --merge_lora true")
        return "merge_lora"
    if config.to_mcore or config.to_hf:
        return "to_mcore" if config.to_mcore else "to_hf"
    _require(not config.merge_lora, "--merge_lora true needs --adapters, or the --mcore_model of a run and --to_hf true")
    both = config.model is not None and config.mcore_model is not None
    _require(
        config.test_convert_precision and both,
        "nothing to do: give --to_mcore true, --to_hf true, --merge_lora true, or --test_convert_precision true with --model and "
        "--mcore_model to compare the two",
    )
    return "compare"


def complete_export(config: Config) -> Config:
    """`config` with its folders found and every default filled in; `model` holds config.json, `mcore_model` the weights if given.

    Raises ValueError, one line, for whatever its user must mend.
    """
    asked = conversion(config)
    megatron = None if config.mcore_model is None else find_megatron(config.mcore_model)
    adapters = [str(_find_adapter(name)) for name in config.adapters]
    model = _find_model(config, asked, megatron, adapters)
    shape = read_shape(model)
    ranks = config.tensor_model_parallel_size * config.pipeline_model_parallel_size
    config = replace(
        config,
        model=str(model),
        mcore_model=None if megatron is None else str(megatron),
        adapters=adapters,
        torch_dtype=config.torch_dtype or trainable_dtype(shape),
        nproc_per_node=1 if asked == "merge_lora" else ranks,
        attention_backend="unfused",  # the one that computes in float32
    )
    check_layout(shape, config.tensor_model_parallel_size, policy_pipeline(config))
    check_engine_options(config)
    _check_comparable(config, asked)
    return config if asked == "compare" else _with_output(config, asked)


def _check_comparable(config: Config, asked: Conversion) -> None:
    """Heads are converted, but transformers is asked for the logits of language models alone."""
    if asked == "merge_lora":
        trained_as = _read(Path(config.adapters[0], "adapter_config.json")).get("task_type")
        comparable = converted_head(config).is_language_model and trained_as in (None, "CAUSAL_LM")
        _require(comparable, "--merge_lora is for language models: a run with a head writes the merged model too (merge_lora)")
    elif config.test_convert_precision:
        head = converted_head(config)
        _require(
            head.is_language_model,
            f"--test_convert_precision compares the logits of language models, this is {head.kind}: leave it out",
        )


def _find_model(config: Config, asked: Conversion, megatron: Path | None, adapters: list[str]) -> Path:
    """The folder that says what the model is; it holds the weights that the Megatron checkpoint, if any, does not."""
    adapter = None if megatron is None else adapter_of(megatron)
    if adapter is not None and asked == "compare":
        raise ValueError(
            f"--mcore_model {config.mcore_model} holds an adapter alone: --to_hf true --test_convert_precision true merges and "
            "compares it"
        )
    if adapter is not None:
        return _find_base(config, adapter.base, str(megatron))
    if adapters:
        recorded = _read(Path(adapters[0], "adapter_config.json")).get("base_model_name_or_path")
        base = _find_base(config, recorded, adapters[0])
        if _is_megatron(base):
            raise ValueError(
                f"the base model {base} is a Megatron checkpoint: convert it first (--mcore_model {base} --to_hf true) and give "
                "the result as --model"
            )
        return base
    if config.model is None:
        check_described(megatron)
    model = local_model(config.model or str(megatron), use_hf=config.use_hf)
    check_files(model, weights=asked != "to_hf")
    return model


def _find_base(config: Config, recorded: str | None, adapter: str) -> Path:
    """The base of an adapter: `--model`, or the one that is recorded with it."""
    name = config.model or recorded
    if not name:
        raise ValueError(f"{adapter} does not say which model it belongs to: give it as --model")
    try:
        base = local_model(name, use_hf=config.use_hf)
    except ValueError as error:
        if config.model:
            raise
        raise ValueError(f"the base model of {adapter} is not found, give it as --model: {error}") from None
    check_files(base, weights=not _is_megatron(base))
    return base


def _is_megatron(model: Path) -> bool:
    """Whether the model's weights are in Megatron's format alone."""
    return holds_megatron(model) and adapter_of(model) is None and not any(model.glob("*.safetensors"))


def _find_adapter(name: str) -> Path:
    folder = Path(name).expanduser().resolve()
    _require(folder.is_dir(), f"--adapters {name}: no such folder")
    if not (folder / "adapter_config.json").is_file():
        hint = f"; its {MEGATRON}/ is converted by --mcore_model {name} --to_hf true" if holds_megatron(folder) else ""
        raise ValueError(f"--adapters {name} holds no PEFT adapter (adapter_config.json){hint}")
    if not any((folder / file).is_file() for file in ADAPTER_FILES):
        raise ValueError(f"--adapters {name} has no weights ({' or '.join(ADAPTER_FILES)})")
    return folder


def _with_output(config: Config, asked: Conversion) -> Config:
    """With an absolute output_dir that can be written and is none of the sources."""
    source = {"to_mcore": config.model, "to_hf": config.mcore_model, "merge_lora": (config.adapters or [""])[0]}[asked]
    beside = Path.cwd() if asked == "to_mcore" else Path(source).parent
    given = config.output_dir or str(beside / f"{Path(source).name}-{SUFFIXES[asked]}")
    config = replace(config, output_dir=lasting_folder(given, "output_dir"))
    output = Path(config.output_dir)
    check_writable(output)
    sources = [Path(name) for name in (config.model, config.mcore_model, *config.adapters) if name is not None]
    if output.resolve() in sources:
        raise ValueError(f"output_dir {output} is the model that is read: choose another")
    if not config.exist_ok and output.exists() and any(output.iterdir()):
        raise ValueError(f"output_dir {output} is not empty: choose another, or replace its weights with --exist_ok true")
    return config


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise ValueError(text)


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
