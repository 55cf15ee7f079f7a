"""The columns that each task on dataset rows needs beside the conversation, and a right row of each task."""

from __future__ import annotations

import json
from typing import Any

from rlhf.config import RERANKERS

QUESTION = {"role": "user", "content": "What is 2+3?"}
ANSWER = {"role": "assistant", "content": "5"}
ANSWERED = ("dpo", "rm", "kto")  # tasks that judge an answer
SPEAKERS = ("assistant", "gpt", "bot", "tool_call", "function_call")
ROWS: dict[str, dict[str, Any]] = {
    "pt": {"messages": [{"role": "assistant", "content": "Any text."}]},
    "sft": {"messages": [QUESTION, ANSWER]},
    "gkd": {"messages": [QUESTION, ANSWER]},
    "grpo": {"messages": [QUESTION], "solution": "5"},
    "infer": {"messages": [QUESTION]},
    "eval": {"messages": [QUESTION], "solution": "5"},
    "dpo": {"messages": [QUESTION, ANSWER], "rejected_response": "6"},
    "rm": {"messages": [QUESTION, ANSWER], "rejected_response": "6"},
    "kto": {"messages": [QUESTION, ANSWER], "label": True},
    "seq_cls": {"messages": [{"role": "user", "content": "A fine film."}], "label": 1},
    "embedding": {
        "messages": [QUESTION],
        "positive_messages": [[{"role": "user", "content": "2+3 is 5."}]],
        "negative_messages": [[{"role": "user", "content": "The sun is a star."}]],
    },
    **dict.fromkeys(
        RERANKERS,
        {
            "messages": [QUESTION],
            "positive_messages": [[{"role": "assistant", "content": "2+3 is 5."}]],
            "negative_messages": [[{"role": "assistant", "content": "The sun is a star."}]],
        },
    ),
}


def right_row(config: Any) -> str:
    """A right row of the task, as JSON."""
    row = ROWS[config.task]
    if config.task == "embedding" and _has_labels(config):
        row = {name: value for name, value in row.items() if name != "negative_messages"} | {"label": 1}
    if config.task == "seq_cls" and config.problem_type == "multi_label_classification":
        row = row | {"label": [0, 1]}
    if config.task == "seq_cls" and config.problem_type == "regression":
        row = row | {"label": 0.5 if config.num_labels == 1 else [0.5] * config.num_labels}
    return json.dumps(row)


def missing_column(row: dict[str, Any], config: Any) -> str | None:
    """What the task needs and the row does not have, in words. Names of columns are taken as lower case."""
    given = {str(name).lower() for name, value in row.items() if value is not None and value != [] and value != ""}
    for names in needed_columns(config):
        if not given & set(names):
            return f"{config.task} needs the column `{'` or `'.join(names)}`, this row has {', '.join(map(str, row)) or 'none'}"
    if config.task in ANSWERED and "messages" in given and not _is_answered(row):
        return f"{config.task} needs an answer, a last message of role assistant, and `messages` has none"
    return None


def needed_columns(config: Any) -> list[tuple[str, ...]]:
    """Of each, one of several names."""
    match config.task:
        case "dpo" | "rm":
            return [("rejected_response", "rejected_messages")]
        case "kto" | "seq_cls":
            return [("label",)]
        case "embedding":
            return [("positive_messages",)] + ([("label",)] if _has_labels(config) else [])
        case "reranker" | "generative_reranker":
            return [("positive_messages",), ("negative_messages",)]
    return []


def _has_labels(config: Any) -> bool:
    """Whether an embedding loss compares two texts by their label."""
    return config.loss_type not in (None, "infonce")


def _is_answered(row: dict[str, Any]) -> bool:
    messages = next(value for name, value in row.items() if str(name).lower() == "messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        return True  # a list as text: the data worker reads it
    last = messages[-1]
    return last.get("role", last.get("from")) in (*SPEAKERS, None)
