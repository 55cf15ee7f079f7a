"""Rows for embeddings, rerankers and classification: the texts of a row, each with what its loss wants of it.

Columns are ms-swift's. A row that cannot be used is answered with the reason.
"""

from __future__ import annotations

import json
import math
import zlib
from typing import Any

import numpy as np

from rlhf.head_losses import ANCHOR
from rlhf.variables import variable

EMPTY_TEXT = "with an empty text"
NO_LABEL = "without a label"
OUT_OF_RANGE = "with a label out of range"
WRONG_LABEL = "with a label of the wrong kind"
NO_POSITIVE = "without a positive text"
NO_NEGATIVE = "without a negative text"

Messages = list[dict[str, Any]]
Texts = list[tuple[Messages, tuple[float, ...]]]  # a text, its targets


def head_rows(row: dict[str, Any], config: Any) -> Texts | str:
    """The texts of a row of seq_cls, embedding, reranker or generative_reranker; or why it is left out."""
    if config.task == "seq_cls":
        labels = class_targets(row.get("label"), problem_type=config.problem_type, num_labels=config.num_labels)
        texts = labels if isinstance(labels, str) else [(row["messages"], labels)]
    elif config.task == "embedding":
        texts = _compared_texts(row, config)
    else:
        texts = _documents(row, config)
    if not isinstance(texts, str) and any(_is_empty(messages) for messages, _ in texts):
        return EMPTY_TEXT
    return texts


def class_targets(label: Any, *, problem_type: str, num_labels: int) -> tuple[float, ...] | str:
    """What the loss wants of a `label`: a class, 0 or 1 for each class, or numbers; or why it will not do."""
    if label is None:
        return NO_LABEL
    values = label if isinstance(label, list) else [label]
    numbers = all(isinstance(value, (bool, int, float)) and math.isfinite(value) for value in values)
    if not numbers or isinstance(label, list) and problem_type == "single_label_classification":
        return WRONG_LABEL
    if problem_type == "regression":
        return tuple(map(float, values)) if len(values) == num_labels else OUT_OF_RANGE
    if any(value != int(value) for value in values):
        return WRONG_LABEL
    if any(not 0 <= value < num_labels for value in values):
        return OUT_OF_RANGE
    if problem_type == "single_label_classification":
        return (float(label),)
    return tuple(float(index in values) for index in range(num_labels))


def _compared_texts(row: dict[str, Any], config: Any) -> Texts | str:
    """Anchor, positive and, for infonce, negatives; INFONCE_HARD_NEGATIVES of them, the first ones or repeated ones."""
    positives, negatives = row.get("positive_messages") or [], row.get("negative_messages") or []
    if not positives:
        return NO_POSITIVE
    label = row.get("label")
    if config.loss_type == "infonce":
        label = 1.0
        if count := variable(config, "INFONCE_HARD_NEGATIVES"):
            if not negatives:
                return NO_NEGATIVE
            negatives = [negatives[place % len(negatives)] for place in range(count)]
    else:
        negatives = []
        if label is None:
            return NO_LABEL
        if not isinstance(label, (bool, int, float)):
            return WRONG_LABEL
        if config.loss_type != "cosine_similarity" and label not in (0, 1):
            return OUT_OF_RANGE
    texts = [row["messages"], positives[0], *negatives]
    return [(messages, (0.0 if place else ANCHOR, float(label))) for place, messages in enumerate(texts)]


def _documents(row: dict[str, Any], config: Any) -> Texts | str:
    """Groups of a relevant document and others, each after the query.

    Of more than MAX_POSITIVE_SAMPLES and MAX_NEGATIVE_SAMPLES some are drawn, once for the run, by `data_seed` and the row.
    """
    query, positives, negatives = row["messages"], row.get("positive_messages") or [], row.get("negative_messages") or []
    if not positives:
        return NO_POSITIVE
    if not negatives:
        return NO_NEGATIVE
    generator = np.random.default_rng([config.data_seed, zlib.crc32(json.dumps([query, positives, negatives]).encode())])
    texts: Texts = []
    for positive in _drawn(positives, variable(config, "MAX_POSITIVE_SAMPLES"), generator):
        texts.append(([*query, *positive], (1.0,)))
        drawn = _drawn(negatives, variable(config, "MAX_NEGATIVE_SAMPLES"), generator)
        texts += [([*query, *negative], (0.0,)) for negative in drawn]
    return texts


def _drawn(texts: list[Messages], most: int, generator: np.random.Generator) -> list[Messages]:
    if len(texts) <= most:
        return texts
    return [texts[place] for place in sorted(generator.choice(len(texts), most, replace=False))]


def _is_empty(messages: Messages) -> bool:
    return not messages or not str(messages[-1]["content"]).strip()
