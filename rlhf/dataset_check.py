"""A quick look at local dataset files, so that a bad one is refused before anything starts.

Reads the forms that ms-swift maps to `messages`: messages or conversation(s), instruction with input and output, and
query-like with response-like columns. Hub ids, folders, Parquet and text files are left to the data worker.
"""

from __future__ import annotations

import ast
import csv
import json
import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

from rlhf.config import SCORED, reads_prompts
from rlhf.dataset_columns import missing_column, right_row

LOOKED_AT = 10_000  # rows of each file
FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
CONVERSATIONS = ("messages", "conversation", "conversations")
QUERIES = ("query", "prompt", "input", "instruction", "question", "problem")
RESPONSES = (
    "response", "answer", "output", "targets", "target", "answer_key", "answers", "solution", "text", "completion",
    "content",
)  # fmt: skip
ROLES = (
    "system", "user", "human", "assistant", "gpt", "bot", "tool", "tool_call", "tool_response", "function_call",
    "function_response", "observation", "observations",
)  # fmt: skip
NEEDS_SOLUTION = ("accuracy", "cosine")


def check_dataset(config: Any) -> None:
    """Check the local files of `config.dataset` and `config.val_dataset`.

    Raises:
        ValueError: in one line, what is wrong in which line of which file, and what a right row looks like.
    """
    if not config.dataset:
        raise ValueError("no dataset given: --dataset FILE.jsonl, or a hub id")
    for name in [*config.dataset, *config.val_dataset]:
        path, limit = local_file(name)
        if path is not None and os.path.splitext(path)[1] in (".jsonl", ".json", ".csv"):
            _check_file(path, config, LOOKED_AT if limit is None or config.dataset_shuffle else min(limit, LOOKED_AT))


def local_file(name: str) -> tuple[str | None, int | None]:
    """The file and the number of rows of `FILE#ROWS`; no file (None) for a folder or a hub id.

    Raises:
        ValueError: it names a file that does not exist, or ROWS is not a positive number.
    """
    path, rows = name, None
    if not os.path.exists(path):
        path = path.removeprefix("hf::").removeprefix("ms::")
        if "#" in path:
            path, text = path.rsplit("#", 1)
            if not text.isdecimal() or int(text) == 0:
                raise ValueError(f"dataset {name}: {text!r} after # is not a positive number of rows")
            rows = int(text)
    if os.path.isdir(path):
        return None, rows
    if os.path.isfile(path):
        if not os.access(path, os.R_OK):
            raise ValueError(f"dataset file {path} is not readable")
        if os.path.getsize(path) == 0:
            raise ValueError(f"dataset file {path} is empty")
        return path, rows
    if path.endswith(FILE_TYPES) or path.startswith(("/", "./", "../", "~")):
        raise ValueError(f"dataset file {path} does not exist (working folder: {os.getcwd()})")
    return None, rows


def _check_file(path: str, config: Any, limit: int) -> None:
    prompts = reads_prompts(config)
    built_in = config.task in SCORED and not config.external_plugins  # a plug-in may take a built-in's name
    functions = [name for name in config.reward_funcs if name in NEEDS_SOLUTION] if built_in else []
    empty = True
    for place, row in islice(_rows(path), limit):
        empty = False
        problem = _problem(row, prompts=prompts) or missing_column(row, config)
        if problem:
            raise ValueError(f"{path}, {place}: {problem}; a right row: {right_row(config)}")
        if functions and "solution" not in row:
            raise ValueError(
                f"{path}, {place}: reward function {functions[0]} needs the column `solution`, this row has "
                f"{', '.join(row)}; a right row: {right_row(config)}"
            )
    if empty:
        raise ValueError(f"dataset file {path} has no rows")


def _rows(path: str) -> Iterator[tuple[str, Any]]:
    """Each row with the place to name in an error."""
    try:
        if path.endswith(".csv"):
            with open(path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                for row in reader:
                    yield f"line {reader.line_num}", row
        elif path.endswith(".json") and _starts_with_bracket(path):
            with open(path, encoding="utf-8") as file:
                for number, row in enumerate(_parsed(file.read(), path, line=1), 1):
                    yield f"row {number}", row
        else:
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"line {number}", _parsed(line, path, line=number)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def _starts_with_bracket(path: str) -> bool:
    with open(path, encoding="utf-8") as file:
        while character := file.read(1):
            if not character.isspace():
                return character == "["
    return False


def _parsed(text: str, path: str, *, line: int) -> Any:
    text = text.rstrip()
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        found = text.split("\n")[error.lineno - 1][:80]
        raise ValueError(
            f"{path}, line {line + error.lineno - 1}, column {error.colno}: not JSON ({error.msg}): {found!r}"
        ) from None


def _problem(row: Any, *, prompts: bool) -> str | None:
    """What is wrong with a row, if anything."""
    if not isinstance(row, dict):
        return f"a row must be an object, not {_kind(row)}"
    columns = {str(key).lower(): value for key, value in row.items()}
    name = next((name for name in CONVERSATIONS if name in columns), None)
    if name is not None:
        return _messages_problem(name, columns[name], prompts=prompts)
    query = next((name for name in QUERIES if columns.get(name)), None)
    if query is None and (prompts or not any(columns.get(name) for name in RESPONSES)):
        return f"neither messages nor a query: its columns are {', '.join(map(str, row)) or 'none'}"
    if query is not None and not isinstance(columns[query], str):
        return f"`{query}` must be text, not {_kind(columns[query])}"
    return None


def _messages_problem(name: str, messages: Any, *, prompts: bool) -> str | None:
    if isinstance(messages, str):
        try:
            messages = _literal(messages)
        except (ValueError, SyntaxError):
            return f"`{name}` must be a list of messages, not text"
    if not isinstance(messages, list):
        return f"`{name}` must be a list of messages, not {_kind(messages)}"
    if not messages:
        return f"`{name}` is an empty list"
    roles = set()
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return f"message {number} of `{name}` must be an object with role and content, not {_kind(message)}"
        if not {"role", "from", "content", "value"} & message.keys() and {"user", "human"} & message.keys():
            roles.add("user")  # ShareGPT pairs: {"human": ..., "assistant": ...}
            continue
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or content is None and not message.get("tool_calls"):
            return f"message {number} of `{name}` must have role and content, it has {', '.join(message) or 'nothing'}"
        if role.replace("-", "_") not in ROLES:
            return f"message {number} of `{name}` has the unknown role {role!r} (system, user, assistant, tool)"
        if not isinstance(content, (str, list, dict, type(None))):
            return f"the content of message {number} of `{name}` must be text, not {_kind(content)}"
        roles.add(role)
    if prompts and not roles & {"user", "human"}:
        return f"`{name}` has no user message to answer"
    return None


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return ast.literal_eval(text)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
