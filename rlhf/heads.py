"""What a task's model ends in: a language model's output layer, a head of scores, or nothing (embeddings)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf.config import Config
from rlhf.megatron_folder import Adapter, adapter_of
from rlhf.model_folder import read_shape

Kind = Literal["causal_lm", "seq_cls", "embedding", "generative_reranker"]  # mcore-bridge's names


@dataclass(frozen=True, kw_only=True)
class Head:
    """What follows the last layer, at the last token of a sequence unless it is a language model."""

    kind: Kind
    num_labels: int | None = None  # of seq_cls
    problem_type: str | None = None  # of seq_cls: what config.json shall say of its labels

    @property
    def is_language_model(self) -> bool:
        """Whether it gives logprobs of every token."""
        return self.kind == "causal_lm"

    @property
    def has_output_matrix(self) -> bool:
        """Whether the model has a row for each token there, which may be its embedding too."""
        return self.kind in ("causal_lm", "generative_reranker")


LANGUAGE_MODEL = Head(kind="causal_lm")
SCORE = Head(kind="seq_cls", num_labels=1)


def head_of(config: Config | Adapter) -> Head:
    """That of the policy of a resolved config, or of the model that an adapter was trained with."""
    match config.task:
        case "rm" | "reranker":
            return SCORE
        case "seq_cls":
            return Head(kind="seq_cls", num_labels=config.num_labels, problem_type=config.problem_type)
        case "embedding" | "generative_reranker":
            return Head(kind=config.task)
    return LANGUAGE_MODEL


def converted_head(config: Config) -> Head:
    """That of the model that an export reads, of a complete config. A generative reranker's weights are a language model's."""
    adapter = None if config.mcore_model is None else adapter_of(Path(config.mcore_model))
    if adapter is not None:
        head = head_of(adapter)
        return LANGUAGE_MODEL if head.kind == "generative_reranker" else head
    shape = read_shape(Path(config.model))
    if shape.num_labels is not None:
        return Head(kind="seq_cls", num_labels=shape.num_labels, problem_type=shape.problem_type)
    return Head(kind="embedding") if shape.ending == "Model" else LANGUAGE_MODEL
