"""What a model ends in beside a language model's output layer: how mcore-bridge builds it, and what config.json says of it.

Letters: T packed tokens, B sequences, K values (labels, a score, or the hidden size).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.weights.checkpoint_names import checkpoint_tensors, tensor_shapes
from rlhf.heads import Head

if TYPE_CHECKING:
    import torch

CLASSES = {"causal_lm": "ForCausalLM", "seq_cls": "ForSequenceClassification", "embedding": "Model"}  # endings of transformers'


def head_settings(head: Head) -> dict[str, Any]:
    """Fields of mcore-bridge's model config."""
    if head.is_language_model:
        return {}
    settings: dict[str, Any] = {"task_type": head.kind, "num_labels": head.num_labels}
    if head.kind != "generative_reranker":  # there is no output matrix that could be the embedding
        settings["untie_embeddings_and_output_weights"] = True
    return settings


def start_head(module: torch.nn.Module, head: Head, folder: Path, *, seed: int, environment: Mapping[str, str]) -> None:
    """A head of scores starts at random, the same on all ranks; a generative reranker learns its words.

    Raises ValueError when such a word is not one token.
    """
    if head.kind == "seq_cls" and module.post_process:
        module.output_layer.weight.data.copy_(_random(module, seed))
    if head.kind == "generative_reranker":
        _set_words(module, folder, environment)


def load_safetensors(module: torch.nn.Module, head: Head, folder: Path) -> None:
    """Fill the model from `folder`'s safetensors; a head of scores that they do not have stays as it is.

    Raises ValueError with the name of a tensor that this rank's part of the model needs and they do not have.
    """
    bridge = module.config.bridge
    key, output = bridge.hf_score_key, bridge.hf_lm_head_key
    has_own_output = head.has_output_matrix and module.config.untie_embeddings_and_output_weights and module.post_process
    if has_own_output and output not in tensor_shapes(folder):  # mcore-bridge would leave it at random
        raise _lacks(folder, output)
    if head.kind == "seq_cls":  # mcore-bridge would pad the labels as it pads a vocabulary for its tensor ranks
        bridge.hf_score_key = None
    bridge._remove_prefix = partial(_Tensors, folder=folder)  # each tensor is read from a result of this
    bridge.load_weights([module], str(folder))
    del bridge._remove_prefix
    bridge.hf_score_key = key
    if head.kind == "seq_cls" and module.post_process and key in checkpoint_tensors(folder).required:
        module.output_layer.weight.data.copy_(_stored(folder, key))


class _Tensors(dict):
    """The tensors of a folder with a prefix, by the rest of their names; a missing one is refused by its whole name."""

    def __init__(self, tensors: dict[str, Any], prefix: str, *, folder: Path):
        super().__init__({name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)})
        self.prefix, self.folder = getattr(tensors, "prefix", "") + prefix, folder

    def __missing__(self, name: str) -> None:
        raise _lacks(self.folder, self.prefix + name)


def _lacks(folder: Path, name: str) -> ValueError:
    return ValueError(f"{folder} has no tensor {name}, which the model of its config.json needs: get its safetensors anew")


def last_token_values(outputs: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """[1, T, K], [B + 1] -> [B, K] float32: what the model says at the last token of each sequence."""
    return outputs[0, cu_seqlens[1:].long() - 1].float()


def described(settings: dict[str, Any], head: Head, folder: Path) -> dict[str, Any]:
    """`settings`, the config.json of `folder`, for a model with this head."""
    if head.kind in ("causal_lm", "generative_reranker"):
        return settings
    name = (settings.get("architectures") or ["Model"])[0]
    for ending in CLASSES.values():
        name = name.removesuffix(ending)
    settings = settings | {"architectures": [name + CLASSES[head.kind]]}
    if head.kind == "embedding":
        return settings
    if len(settings.get("id2label") or {}) != head.num_labels:
        names = [f"LABEL_{label}" for label in range(head.num_labels)]
        settings |= {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    if head.problem_type is not None:
        settings |= {"problem_type": head.problem_type}
    if settings.get("pad_token_id") is None:  # by it transformers finds the last token of each row
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        settings |= {"pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id}
    return settings


def described_tensors(shapes: dict[str, tuple[int, ...]], head: Head, *, score: str) -> dict[str, tuple[int, ...]]:
    """`shapes`, {name: shape} of a Hugging Face folder, for the model with this head, whose scores' weight is called `score`."""
    if head.kind in ("causal_lm", "generative_reranker"):
        return shapes
    body = {name: shape for name, shape in shapes.items() if name not in ("lm_head.weight", score)}
    if head.kind == "embedding":
        return body
    hidden = next(shape[1] for name, shape in body.items() if name.endswith("embed_tokens.weight"))
    return body | {score: (head.num_labels, hidden)}


def _stored(folder: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():
                return tensors.get_tensor(name)
    raise ValueError(f"{folder} has no tensor {name}")


def _random(module: torch.nn.Module, seed: int) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.empty(module.output_layer.weight.shape).normal_(0, module.config.init_method_std, generator=generator)


def _set_words(module: torch.nn.Module, folder: Path, environment: Mapping[str, str]) -> None:
    """The tokens by which a generative reranker says yes and no; mcore-bridge reads them in the process's environment."""
    from transformers import AutoTokenizer

    module.tokenizer = AutoTokenizer.from_pretrained(folder)
    os.environ.update(environment)
    for name, default in (("POSITIVE", "yes"), ("NEGATIVE", "no")):
        name = f"GENERATIVE_RERANKER_{name}_TOKEN"
        word = environment.get(name, default)
        if module.tokenizer.convert_tokens_to_ids(word) in (None, module.tokenizer.unk_token_id):
            raise ValueError(f"{name} {word!r} is no token of {folder}: set it in the environment to one that is")
