"""A LoRA checkpoint as PEFT saves it: which model it is for, and whether vLLM can load it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.config import Config

MAX_RANK = 512  # vLLM's
PLAIN = {"peft_type": ("LORA",), "bias": ("none",), "modules_to_save": (None, []), "use_dora": (False,)}


def with_adapter(config: Config) -> Config:
    """`config` with its adapter's folder in full and, where no model was given, the adapter's. ValueError in one line."""
    if len(config.adapters) != 1:
        raise ValueError(f"--adapters takes one checkpoint, got {len(config.adapters)}: {' '.join(config.adapters)}")
    folder = Path(config.adapters[0]).expanduser().absolute()
    settings = _settings(folder)
    base = config.model or settings.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder}/adapter_config.json names no base_model_name_or_path: give --model too")
    if config.model is None and Path(base).is_absolute() and not Path(base).exists():
        raise ValueError(f"--adapters {folder}: its base model {base} is gone: give its place as --model")
    return replace(config, adapters=[str(folder)], model=base)


def _settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json. ValueError for one that is missing, or of a kind that vLLM does not load."""
    file = folder / "adapter_config.json"
    try:
        settings = json.loads(file.read_text())
    except OSError as error:
        hint = ": this is a whole model, give it as --model" if (folder / "config.json").exists() else ""
        raise ValueError(f"--adapters {folder}: no adapter_config.json ({error.strerror}){hint}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not (folder / "adapter_model.safetensors").exists():
        raise ValueError(f"--adapters {folder}: no adapter_model.safetensors")
    for name, plain in PLAIN.items():
        if settings.get(name, plain[0]) not in plain:
            raise ValueError(f"{file}: {name} {settings[name]} is not supported: merge it, and give --model")
    if settings["r"] > MAX_RANK:
        raise ValueError(f"{file}: rank {settings['r']} is more than vLLM's {MAX_RANK}: merge it, and give --model")
    return settings
