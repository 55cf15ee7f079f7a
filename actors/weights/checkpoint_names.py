"""Which tensors a complete set of weights must hold, as the model's folder says: no weights are read."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from rlhf.megatron_folder import TENSORS


@dataclass(frozen=True, kw_only=True)
class CheckpointTensors:
    """Names and shapes of a Hugging Face checkpoint, by what a weight push must do with them."""

    required: dict[str, tuple[int, ...]]
    redundant: frozenset[str]  # may be pushed or not, never loaded: tied to another tensor, or computed
    tied: bool  # the output layer is the embedding


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """{name: shape} from the headers of `folder`'s safetensors files, or its tensors.json. ValueError when it has neither."""
    files = sorted(folder.glob("*.safetensors"))
    if (index := folder / "model.safetensors.index.json").exists():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    if files:
        return {name: shape for file in files for name, shape in _header(file).items()}
    if (folder / TENSORS).exists():
        return {name: tuple(shape) for name, shape in json.loads((folder / TENSORS).read_text()).items()}
    raise ValueError(f"{folder} has no *.safetensors file: convert the model with transformers' `save_pretrained`")


def checkpoint_tensors(folder: str | Path) -> CheckpointTensors:
    """The tensors of the model in `folder`. ValueError when it does not say."""
    folder = Path(folder)
    shapes = tensor_shapes(folder)
    config = json.loads((folder / "config.json").read_text())
    tied = config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", False))
    redundant = {name for name in shapes if name.endswith("rotary_emb.inv_freq")}
    if tied:
        redundant |= {"lm_head.weight"} | {name for name in shapes if name.endswith("lm_head.weight")}
    required = {name: shape for name, shape in shapes.items() if name not in redundant}
    return CheckpointTensors(required=required, redundant=frozenset(redundant), tied=tied)


def checkpoint_dtype(folder: str | Path) -> str:
    """The dtype that `folder`'s config.json states ("float32", "bfloat16", ...), or "auto"."""
    config = json.loads((Path(folder) / "config.json").read_text())
    text = config.get("text_config", {})
    stated = [section.get(key) for section in (config, text) for key in ("dtype", "torch_dtype")]
    return next((dtype for dtype in stated if dtype), "auto")


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        entries = json.loads(stream.read(length))
    return {name: tuple(entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}
