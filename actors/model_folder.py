"""The model's folder as this node sees it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from actors.megatron.head import described
from rlhf.heads import LANGUAGE_MODEL, Head
from rlhf.megatron_folder import TENSORS, holds_megatron

COMPANIONS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
OF_A_RUN = ("manifest.json", "controller.json")  # when the model's folder is itself a checkpoint


def require_model(folder: str) -> None:
    """ValueError naming this node when it does not see the model's folder."""
    if not Path(folder, "config.json").exists():
        raise ValueError(_unseen(folder))


def require_megatron(folder: str) -> None:
    """ValueError naming this node when it does not see the Megatron checkpoint in the folder."""
    if not holds_megatron(Path(folder)):
        raise ValueError(_unseen(folder))


def copy_companions(source: Path, target: Path, *, dtype: str | None, head: Head = LANGUAGE_MODEL) -> None:
    """What stands beside the weights of `source`: tokenizer, generation config, config.json stating `dtype` (None: not that).

    config.json also says what `head` the weights beside it in `target` end in.
    """
    for file in sorted(source.iterdir()):
        companion = file.suffix in COMPANIONS and file.name not in (*OF_A_RUN, "config.json", TENSORS)
        if file.is_file() and companion and not file.name.endswith(".safetensors.index.json"):
            shutil.copyfile(file, target / file.name)
    if dtype is None:
        return
    settings = json.loads((source / "config.json").read_text())
    settings["torch_dtype" if "torch_dtype" in settings else "dtype"] = dtype
    settings = described(settings, head, source)
    (target / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _unseen(folder: str) -> str:
    import ray

    return (
        f"node {ray.util.get_node_ip_address()} does not see the model {folder}: put it on a file system that every node "
        "sees, under the same path"
    )
