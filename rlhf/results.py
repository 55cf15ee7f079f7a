"""What infer and eval write: a row a response, as JSON lines."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rlhf.config import Config
from rlhf.records import Prompt
from rlhf.run_folder import run_folder, write_args

SECONDS = 10.0  # between two lines of progress
T = TypeVar("T")


def result_path(config: Config) -> Path | None:
    """The file of the results: the one asked for, or one in a new run folder; None when nothing is to be written.

    Raises ValueError when it cannot be written.
    """
    if config.result_path is None:
        suffix = {"infer": "infer.jsonl", "eval": "eval.json"}[config.task]
        if not config.dataset:
            return None
        folder = run_folder(config)
        write_args(folder, config)
        return folder / suffix
    path = Path(config.result_path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"result_path {path} cannot be written: {error.strerror}") from None
    return path


def response_row(prompt: Prompt, text: str, finish_reason: str, length: int) -> dict[str, Any]:
    """One response with its conversation and the row's other columns; `length` in tokens."""
    return prompt.columns | {
        "messages": [*prompt.messages, {"role": "assistant", "content": text}],
        "response": text,
        "finish_reason": finish_reason,
        "response_length": length,
    }


class RowFile:
    """Appends rows to a .jsonl file, each on the disk at once."""

    def __init__(self, path: Path):
        self.file = path.open("a", encoding="utf-8")

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        self.file.flush()


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """`items`, with a line on the screen from time to time."""
    said = time.monotonic()
    for count, item in enumerate(items, 1):
        if time.monotonic() - said > SECONDS:
            said = time.monotonic()
            print(f"{count} of {total} {what}", flush=True)
        yield item
