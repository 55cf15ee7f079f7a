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
ORIGIN = "derived_from"  # in config.json: the folder of the model that this one was made from in the end


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

    config.json also says what `head` the weights beside it in `target` end in, and where the model comes from: ms-swift knows
    a model's type and chat template by the name of its folder (Qwen2.5-7B-Instruct), and `target` is called otherwise.
    """
    for file in sorted(source.iterdir()):
        companion = file.suffix in COMPANIONS and file.name not in (*OF_A_RUN, "config.json", TENSORS)
        if file.is_file() and companion and not file.name.endswith(".safetensors.index.json"):
            shutil.copyfile(file, target / file.name)
    if dtype is None:
        return
    settings = json.loads((source / "config.json").read_text())
    settings["torch_dtype" if "torch_dtype" in settings else "dtype"] = dtype
    settings = described({ORIGIN: str(source)} | settings, head, source)
    (target / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def origin(folder: str) -> str:
    """The model that the one in `folder` was made from in the end, or `folder` itself."""
    described = Path(folder, "config.json")
    return json.loads(described.read_text()).get(ORIGIN, folder) if described.exists() else folder


def _unseen(folder: str) -> str:
    import ray

    return (
        f"node {ray.util.get_node_ip_address()} does not see the model {folder}: put it on a file system that every node "
        "sees, under the same path"
    )
