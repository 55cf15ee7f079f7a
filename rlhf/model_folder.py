"""What a model folder says about itself, read as JSON: sizes, parameter count, and whether it is complete.

Letters: D hidden size, F feed-forward size, H heads, K key-value heads, d head size, V vocabulary, L layers, E experts.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.megatron_folder import holds_megatron

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")  # ./model and ../model are folders
LENGTH_KEYS = ("max_position_embeddings", "seq_length", "n_positions", "model_max_length", "max_seq_len")
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenization_*.py", "*.tiktoken")
ENDINGS = ("ForCausalLM", "ForSequenceClassification", "Model")  # of an architecture's name: what the model ends in
QKV_BIAS = {"qwen2", "qwen2_moe"}  # always there; elsewhere `attention_bias` says
QK_NORM = {"qwen3", "qwen3_moe"}
WITH_EXPERTS = {"qwen2_moe", "qwen3_moe"}
COUNTED = {"qwen2", "qwen3", "llama", "mistral"} | WITH_EXPERTS


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Of each layer of a mixture-of-experts model."""

    count: int  # E
    active: int  # that a token goes to
    ffn_size: int  # F of one
    shared_gate: bool  # how much of the shared expert is taken is learned too


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder-only transformer."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_size: int  # of the MLP that every token takes; beside experts the shared one's, 0 without
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_length: int | None  # tokens
    dtype: str  # "float32", "bfloat16", ...
    experts: Experts | None = None
    ending: str = ENDINGS[0]  # of ENDINGS
    num_labels: int | None = None  # of a head for classes
    problem_type: str | None = None

    @property
    def exact(self) -> bool:
        """Whether the counts below are this architecture's, or an estimate after Llama's."""
        return self.model_type in COUNTED

    def layer_parameters(self, tensor_size: int = 1) -> int:
        """Parameters of one layer on one of `tensor_size` ranks, without experts.

        D(2H + 2K)d + 3DF and the column biases are split over them; norms, row biases and the router are on each.
        """
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        qkv = heads + 2 * kv_heads
        split = self.hidden_size * (qkv + heads + 3 * self.ffn_size)
        split += (qkv if self.qkv_bias else 0) + (2 * self.ffn_size if self.mlp_bias else 0)
        whole = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        whole += (self.hidden_size if self.output_bias else 0) + (self.hidden_size if self.mlp_bias else 0)
        if self.experts:
            whole += self.hidden_size * (self.experts.count + self.experts.shared_gate)
        return split // tensor_size + whole

    def expert_parameters(self, expert_size: int = 1, expert_tensor_size: int = 1) -> int:
        """Parameters of one layer's experts, 3DF each, on one of the ranks that share them."""
        if self.experts is None:
            return 0
        return self.experts.count // expert_size * 3 * self.hidden_size * self.experts.ffn_size // expert_tensor_size

    def embedding_parameters(self, tensor_size: int = 1) -> int:
        """Parameters of one V x D matrix on one of `tensor_size` ranks; V is padded to their multiple."""
        return math.ceil(self.vocab_size / tensor_size) * self.hidden_size

    def num_parameters(self) -> int:
        """Parameters of the whole model, as Hugging Face counts them (tied ones once)."""
        matrices = 1 if self.tied_embeddings else 2
        layer = self.layer_parameters() + self.expert_parameters()
        return matrices * self.embedding_parameters() + self.num_layers * layer + self.hidden_size

    def stage_parameters(self, stages: list[int], tensor_size: int = 1) -> list[int]:
        """Parameters of a rank of each pipeline stage, without experts; `stages`: its layers.

        The first stage holds the embedding, the last one the output layer, or a copy of a tied embedding.
        """
        matrix = self.embedding_parameters(tensor_size)
        held = [layers * self.layer_parameters(tensor_size) for layers in stages]
        held[0] += matrix
        held[-1] += self.hidden_size + (0 if len(stages) == 1 and self.tied_embeddings else matrix)
        return held

    def lora_parameters(self, rank: int, modules: list[str], tensor_size: int = 1) -> int:
        """Adapter parameters of one layer on one rank. Column-parallel layers split B (out x r), row-parallel ones A (r x in)."""
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        sizes = {  # in, out
            "linear_qkv": (self.hidden_size, (heads + 2 * kv_heads) // tensor_size),
            "linear_proj": (heads // tensor_size, self.hidden_size),
        } | (_mlp_sizes(self.hidden_size, self.ffn_size // tensor_size) if self.ffn_size else {})
        return _adapters(sizes, rank, modules)

    def expert_lora_parameters(self, rank: int, modules: list[str], expert_size: int = 1) -> int:
        """Adapter parameters of one layer's experts on one of the ranks that share them."""
        if self.experts is None:
            return 0
        return self.experts.count // expert_size * _adapters(_mlp_sizes(self.hidden_size, self.experts.ffn_size), rank, modules)


def _mlp_sizes(hidden_size: int, ffn_size: int) -> dict[str, tuple[int, int]]:
    return {"linear_fc1": (hidden_size, 2 * ffn_size), "linear_fc2": (ffn_size, hidden_size)}


def _adapters(sizes: dict[str, tuple[int, int]], rank: int, modules: list[str]) -> int:
    chosen = sizes if "all-linear" in modules else {name: sizes[name] for name in modules if name in sizes}
    return sum(rank * (width + height) for width, height in chosen.values())


def local_model(name: str, *, use_hf: bool, weights: bool = True, option: str = "model") -> Path:
    """The folder of a model: `name` itself, or the local copy of the hub id that it is.

    A hub id is downloaded when the hub's cache lacks it (`weights` false: its JSON files alone). Raises ValueError,
    which calls it by the name of its `option`.
    """
    folder = Path(name).expanduser()
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        also = " (infer and eval take --adapters too)" if option == "model" else ""
        merged = f"give the model that merge_lora puts into {name}/merged{also}"
        raise ValueError(f"--{option} {name} holds an adapter alone: {merged}")
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise ValueError(f"--{option} {name} is a file: give the folder that holds config.json")
    if HUB_ID.fullmatch(name):
        return _download(name, use_hf=use_hf, weights=weights, option=option)
    raise ValueError(f"--{option} {name}: no such folder (a hub id looks like Qwen/Qwen2.5-7B-Instruct)")


def _download(name: str, *, use_hf: bool, weights: bool, option: str) -> Path:
    hub = "Hugging Face" if use_hf else "ModelScope"
    try:
        if use_hf:
            from huggingface_hub import snapshot_download
        else:
            from modelscope import snapshot_download
        return Path(snapshot_download(name, **({} if weights else {"allow_patterns": ["*.json"]})))
    except Exception as error:  # the hubs' clients raise dozens of kinds
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        other = "" if use_hf else " (--use_hf takes it from Hugging Face)"
        raise ValueError(f"--{option} {name}: no such folder here, and {hub} did not give it{other}: {reason[:200]}") from None


def read_shape(folder: Path) -> ModelShape:
    """The sizes in `folder/config.json`. Raises ValueError when it is missing, broken, or of an unsupported kind."""
    values = _read_json(folder / "config.json")
    kind, architectures = values.get("model_type", ""), values.get("architectures") or []
    has_experts = any(values.get(key) for key in EXPERT_KEYS)
    if has_experts and kind not in WITH_EXPERTS:
        raise ValueError(f"{folder}: {kind} is a mixture-of-experts model; of these there are {', '.join(sorted(WITH_EXPERTS))}")
    if "vision_config" in values or "audio_config" in values or "text_config" in values:
        raise ValueError(f"{folder}: {kind} is a multimodal model, which is not supported yet")
    ending = next((ending for ending in ENDINGS if architectures and architectures[0].endswith(ending)), None)
    if architectures and ending is None:
        raise ValueError(f"{folder}: {architectures[0]} is not a causal language model (...ForCausalLM) or made from one")
    has_classes = ending == "ForSequenceClassification"
    try:
        heads, hidden = int(values["num_attention_heads"]), int(values["hidden_size"])
        bias = bool(values.get("attention_bias", False))
        lengths = [int(values[key]) for key in LENGTH_KEYS if values.get(key)]
        return ModelShape(
            model_type=kind,
            num_layers=int(values["num_hidden_layers"]),
            hidden_size=hidden,
            ffn_size=int(values.get("shared_expert_intermediate_size") or 0) if has_experts else int(values["intermediate_size"]),
            num_heads=heads,
            num_kv_heads=int(values.get("num_key_value_heads") or heads),
            head_dim=int(values.get("head_dim") or hidden // heads),
            vocab_size=int(values["vocab_size"]),
            tied_embeddings=bool(values.get("tie_word_embeddings", False)),
            qkv_bias=bias or kind in QKV_BIAS,
            output_bias=bias and kind not in QKV_BIAS,
            mlp_bias=bool(values.get("mlp_bias", False)),
            qk_norm=kind in QK_NORM,
            max_length=min(lengths) if lengths else None,
            experts=_read_experts(folder, values) if has_experts else None,
            dtype=str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch."),
            ending=ending or ENDINGS[0],
            num_labels=len(values.get("id2label") or "01") if has_classes else None,  # 2 is transformers' default
            problem_type=values.get("problem_type") if has_classes else None,
        )
    except KeyError as error:
        raise ValueError(f"{folder}/config.json lacks {error.args[0]}: {kind or 'this model'} is not supported") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}/config.json is broken: {error}") from None


def _read_experts(folder: Path, values: dict[str, Any]) -> Experts:
    if values.get("mlp_only_layers") or values.get("decoder_sparse_step", 1) != 1:
        raise ValueError(f"{folder}: layers without experts (mlp_only_layers, decoder_sparse_step) are not supported yet")
    return Experts(
        count=next(int(values[key]) for key in EXPERT_KEYS if values.get(key)),
        active=int(values["num_experts_per_tok"]),
        ffn_size=int(values["moe_intermediate_size"]),
        shared_gate=bool(values.get("shared_expert_intermediate_size")),
    )


def excess_ids(folder: str, other: str) -> range:
    """Token ids that the model in `folder` has beyond those of `other`: padding, when they share a tokenizer."""
    own, less = (read_shape(Path(name)).vocab_size for name in (folder, other))
    return range(less, max(own, less))


def check_files(folder: Path, *, weights: bool = True) -> None:
    """The tokenizer and, with `weights`, safetensors are there. Raises ValueError naming what is missing."""
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise ValueError(f"{folder} has no tokenizer (tokenizer.json or tokenizer.model): save it there too")
    if not weights:
        return
    index = folder / "model.safetensors.index.json"
    if index.exists():
        parts = sorted(set(_read_json(index).get("weight_map", {}).values()))
        missing = [part for part in parts if not (folder / part).exists()]
        if missing:
            raise ValueError(f"{folder} lacks {len(missing)} of {len(parts)} weight files, the first is {missing[0]}")
    elif not any(folder.glob("*.safetensors")):
        hint = ": it holds a Megatron checkpoint, give it as --mcore_model" if holds_megatron(folder) else ""
        raise ValueError(f"{folder} has no weights (*.safetensors){hint}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"{file}: {os.strerror(error.errno)}; is this a model folder?") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if isinstance(values, dict):
        return values
    raise ValueError(f"{file}: expected an object, found a {type(values).__name__}")
