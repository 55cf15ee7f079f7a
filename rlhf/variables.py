"""ms-swift's environment variables for embeddings and rerankers, under its names and with its defaults.

The driver reads them once, into `Config.environment`, where every process and the run's args.json find them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf.config import RERANKERS, Config


@dataclass(frozen=True, kw_only=True)
class Variable:
    """One variable: who reads it, as what, and what it is when unset."""

    tasks: tuple[str, ...]
    kind: Callable[[str], Any]
    default: Any
    least: float | None = None
    above: float | None = None


def truth(text: str) -> bool:
    """1, true, yes, on or 0, false, no, off."""
    if text.lower() in ("1", "true", "t", "yes", "y", "on"):
        return True
    if text.lower() in ("0", "false", "f", "no", "n", "off"):
        return False
    raise ValueError("neither true nor false")


_EMBEDDING = ("embedding",)
_GENERATIVE = ("generative_reranker",)
VARIABLES = {
    "INFONCE_TEMPERATURE": Variable(tasks=_EMBEDDING, kind=float, default=0.1, above=0),
    "INFONCE_USE_BATCH": Variable(tasks=_EMBEDDING, kind=truth, default=True),
    "INFONCE_HARD_NEGATIVES": Variable(tasks=_EMBEDDING, kind=int, default=None, least=1),
    "INFONCE_MASK_FAKE_NEGATIVE": Variable(tasks=_EMBEDDING, kind=truth, default=False),
    "INFONCE_FAKE_NEG_MARGIN": Variable(tasks=_EMBEDDING, kind=float, default=0.1),
    "INFONCE_INCLUDE_QQ": Variable(tasks=_EMBEDDING, kind=truth, default=False),
    "INFONCE_INCLUDE_DD": Variable(tasks=_EMBEDDING, kind=truth, default=False),
    "MAX_POSITIVE_SAMPLES": Variable(tasks=RERANKERS, kind=int, default=1, least=1),
    "MAX_NEGATIVE_SAMPLES": Variable(tasks=RERANKERS, kind=int, default=7, least=1),
    "LISTWISE_RERANKER_TEMPERATURE": Variable(tasks=RERANKERS, kind=float, default=1.0, above=0),
    "LISTWISE_RERANKER_MIN_GROUP_SIZE": Variable(tasks=RERANKERS, kind=int, default=2, least=1),
    "GENERATIVE_RERANKER_POSITIVE_TOKEN": Variable(tasks=_GENERATIVE, kind=str, default="yes"),
    "GENERATIVE_RERANKER_NEGATIVE_TOKEN": Variable(tasks=_GENERATIVE, kind=str, default="no"),
}
_BATCH_ONLY = ("INFONCE_MASK_FAKE_NEGATIVE", "INFONCE_INCLUDE_QQ", "INFONCE_INCLUDE_DD")


def read_environment(task: str) -> dict[str, str]:
    """Those of the process's variables that the task reads. Raises ValueError for a value that cannot be."""
    found = {name: os.environ[name] for name, known in VARIABLES.items() if task in known.tasks and name in os.environ}
    values = {name: _parsed(name, text) for name, text in found.items()}
    for name in _BATCH_ONLY:
        if values.get(name) and values.get("INFONCE_USE_BATCH") is False:
            raise ValueError(f"{name} in the environment needs the negatives of the whole batch: unset INFONCE_USE_BATCH")
    return found


def variable(config: Config, name: str) -> Any:
    """The value of a variable for this run."""
    text = config.environment.get(name)
    return VARIABLES[name].default if text is None else _parsed(name, text)


def _parsed(name: str, text: str) -> Any:
    known = VARIABLES[name]
    try:
        value = known.kind(text)
    except ValueError:
        wanted = {truth: "true or false", int: "a whole number", float: "a number"}[known.kind]
        raise ValueError(f"{name}={text} in the environment is not {wanted}") from None
    if known.least is not None and value < known.least:
        raise ValueError(f"{name}={text} in the environment must be at least {known.least}")
    if known.above is not None and value <= known.above:
        raise ValueError(f"{name}={text} in the environment must be above {known.above}")
    return value
