"""How a reward function is called, and what its return value means.

A function returns one value per completion: a finite number is a reward; None means "not applicable to this sample"
and is left out of the weighted sum; anything else is a failure of that sample. An exception, or a list of another
length, is a failure of the whole call. No exception of a reward function leaves this module.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from rlhf.records import GroupTokens

# What functions written for conversations raise when they are given plain strings.
WRONG_FORM = (TypeError, AttributeError, KeyError, IndexError)
TOKEN_IDS = {"completion_ids", "response_token_ids"}  # TRL's name and ms-swift's


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why there is no reward."""

    kind: str  # raised, timeout, died, bad_value
    message: str  # one line


@dataclass(frozen=True, kw_only=True)
class Request:
    """One reward function on some completions of a group; everything but their token ids."""

    function: str
    items: tuple[int, ...]  # which completions of the group
    texts: tuple[str, ...]  # of those
    finish_reasons: tuple[str, ...]  # of those
    prompt_index: int
    messages: list[dict[str, Any]]  # the prompt
    columns: dict[str, Any]  # of the dataset row
    step: int
    max_steps: int | None


Outcome = float | None | Failure  # of one completion: its reward, not applicable, or failed


class RewardFunction:
    """A named callable with what is known about its arguments.

    `completions` go to ms-swift's ORM objects as strings, by position; to plain functions by name, as strings or as
    conversations (`[[{"role": "assistant", "content": text}]]`): strings are tried first, the form that works stays.
    """

    def __init__(self, name: str, target: Callable[..., Any], *, is_orm: bool = False):
        self.name, self.target, self.is_orm = name, target, is_orm
        self.conversational: bool | None = False if is_orm else None  # None: not known yet
        self.runner: asyncio.Runner | None = None  # one event loop for all calls: sessions stay usable
        self.accepted, self.required = _parameters(target, skip_first=is_orm)

    @property
    def takes_token_ids(self) -> bool:
        """Could the function look at token ids?"""
        return self.accepted is None or not TOKEN_IDS.isdisjoint(self.accepted)

    def score(self, texts: list[str], columns: dict[str, list[Any]]) -> tuple[Outcome, ...] | Failure:
        """The outcome of each of `texts` [n]; `columns` holds a list [n] per name and `trainer_state`."""
        try:
            values = self._values(texts, columns)
        except MemoryError as error:  # what it took may not all be given back: the process is no longer to be used
            return Failure(kind="died", message=f"took more memory than reward_memory allows: {describe(error)}")
        except BaseException as error:  # noqa: BLE001 also SystemExit: it must not end the process of the other functions
            return Failure(kind="raised", message=describe(error))
        if not isinstance(values, list):
            message = f"returned {type(values).__name__}, not a list of {len(texts)} numbers"
            return Failure(kind="bad_value", message=message)
        if len(values) != len(texts):
            return Failure(kind="bad_value", message=f"returned {len(values)} values for {len(texts)} completions")
        return tuple(outcome(value) for value in values)

    def _values(self, texts: list[str], columns: dict[str, list[Any]]) -> Any:
        if self.conversational is not None:
            return self._call(_conversations(texts) if self.conversational else texts, columns)
        try:
            values, self.conversational = self._call(texts, columns), False
        except WRONG_FORM as first:
            try:
                values = self._call(_conversations(texts), columns)
            except Exception:  # noqa: BLE001 whatever it is: the first one tells the user more
                raise first from None
            self.conversational = True
        return values

    def _call(self, completions: list[Any], columns: dict[str, Any]) -> Any:
        missing = sorted(self.required - columns.keys() - {"completions"})
        if missing:
            has = ", ".join(sorted(columns))
            raise TypeError(f"needs {', '.join(missing)}, but there is no such dataset column (there are {has})")
        if self.accepted is not None:
            columns = {name: column for name, column in columns.items() if name in self.accepted}
        values = self.target(completions, **columns) if self.is_orm else self.target(completions=completions, **columns)
        if inspect.isawaitable(values):
            self.runner = self.runner or asyncio.Runner()
            values = self.runner.run(_awaited(values))
        scalar = isinstance(values, (str, bytes, dict)) or not hasattr(values, "__iter__")
        return values if scalar else list(values)


def reward_columns(request: Request, tokens: GroupTokens | None) -> dict[str, Any]:
    """What a function is given beside the completions: the dataset row's columns, and the names of ms-swift and TRL.

    Each is a list with one entry per completion, but for `trainer_state`. Without `tokens` there are no token ids.
    """
    n = len(request.items)
    columns: dict[str, Any] = {name: [value] * n for name, value in request.columns.items()}
    columns.pop("completions", None)
    answers = [{"role": "assistant", "content": text} for text in request.texts]
    columns.update(
        prompts=[request.messages] * n,
        messages=[[*request.messages, answer] for answer in answers],
        finish_reason=list(request.finish_reasons),
        is_truncated=[reason == "length" for reason in request.finish_reasons],
        prompt_id=[str(request.prompt_index)] * n,
        request_id=[f"{request.prompt_index}-{item}" for item in request.items],
        trainer_state=SimpleNamespace(global_step=request.step, max_steps=request.max_steps),
    )
    if tokens is not None:
        ids = [tokens.response_ids[item].tolist() for item in request.items]
        columns.update(completion_ids=ids, response_token_ids=ids)
    return columns


def outcome(value: Any) -> Outcome:
    """One returned value as a reward: None, a finite float, or a failure."""
    if value is None:
        return None
    try:
        number = None if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = None
    if number is None or not math.isfinite(number):
        return Failure(kind="bad_value", message=f"returned {repr(value)[:80]}, not a finite number")
    return number


def describe(error: BaseException) -> str:
    """One line: the exception, its first line, and where it was raised."""
    text = str(error).strip().split("\n")[0][:300]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    file, line = (frames[-1].filename, frames[-1].lineno) if frames else ("", 0)
    if isinstance(error, SyntaxError) and error.filename:
        file, line, text = error.filename, error.lineno, error.msg
    where = f" ({file.rsplit('/', 1)[-1]}:{line})" if file else ""
    return f"{type(error).__name__}: {text}{where}" if text else f"{type(error).__name__}{where}"


def _parameters(target: Callable[..., Any], *, skip_first: bool) -> tuple[set[str] | None, set[str]]:
    """Names that `target` takes (None: any), and those it cannot do without."""
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):  # a callable of a C extension
        return None, set()
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)][int(skip_first) :]
    accepts_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
    return None if accepts_any else {p.name for p in named}, {p.name for p in named if p.default is p.empty}


def _conversations(texts: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


async def _awaited(awaitable: Any) -> Any:
    return await awaitable
