"""Words of the command line and values of YAML as typed values of options."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import yaml

WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def closest(word: str, words: Iterable[str]) -> str | None:
    """The nearest of `words`, or None when none is near."""
    found = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return found[0] if found else None


def nearest(word: str, words: Iterable[str], prefix: str = "") -> str:
    """`; did you mean X?`, or nothing when no word is near."""
    found = closest(word, words)
    return f"; did you mean {prefix}{found}?" if found else ""


def untyped(value: Any) -> Any:
    """Words of the command line as YAML reads them: none is true, one is a value, more are a list."""
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        return value
    read = [_yaml_value(word) for word in value]
    return True if not read else read[0] if len(read) == 1 else read


def _yaml_value(word: str) -> Any:
    try:
        value = yaml.safe_load(word)
    except yaml.YAMLError:
        return word
    if isinstance(value, str):  # YAML 1.1 reads 1e-6 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def typed(name: str, kind: Any, value: Any) -> Any:
    """`value` as `kind`. Raises ValueError naming the option, what it takes and what it got."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kinds = [item for item in typing.get_args(kind) if item is not type(None)]
        assert len(kinds) == 1, (name, kind)
        literal = typing.get_origin(kinds[0]) is Literal and "none" in typing.get_args(kinds[0])
        if value is None or (not literal and value in (["None"], ["none"], ["null"])):
            return None
        return typed(name, kinds[0], value)
    if typing.get_origin(kind) is list:
        words = value if isinstance(value, list) else [value]
        if not words:
            raise ValueError(f"--{name} takes one value or more, got none")
        return [_scalar(name, typing.get_args(kind)[0], word) for word in words]
    if typing.get_origin(kind) is dict:
        return _mapping(name, *typing.get_args(kind), untyped(value))
    if isinstance(value, list):
        if not value and kind is bool:
            return True
        if len(value) != 1:
            got = "none" if not value else f"{len(value)}: {' '.join(map(str, value))}"
            raise ValueError(f"--{name} takes one value, got {got}")
        value = value[0]
    return _scalar(name, kind, value)


def _mapping(name: str, key_kind: Any, kind: Any, value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict) or not value:
        raise ValueError(f"--{name} takes pairs such as {{1: 2}}, not {str(value)!r}")
    return {_scalar(name, key_kind, key): _scalar(name, kind, item) for key, item in value.items()}


def _scalar(name: str, kind: Any, value: Any) -> Any:
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    if choices:
        if value in choices:
            return value
        raise ValueError(f"--{name} is one of {', '.join(choices)}, not {str(value)!r}")
    try:
        if kind is bool:
            return value if isinstance(value, bool) else WORDS[str(value).lower()]
        if kind is str:
            if isinstance(value, (str, int, float)) and not isinstance(value, bool):
                return str(value)
        elif not isinstance(value, bool) and (isinstance(value, (str, int)) or kind is float):
            number = kind(value)
            if math.isfinite(number):
                return number
    except (ValueError, TypeError, KeyError):
        pass
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
    raise ValueError(f"--{name} takes {wanted}, not {str(value)!r}")


def check_bounds(name: str, bounds: Mapping[str, Any], value: Any) -> None:
    least, above, most = (bounds[key] for key in ("least", "above", "most"))
    if not isinstance(value, (int, float)):
        return
    if least is not None and value < least:
        raise ValueError(f"--{name} must be at least {least}, not {value}")
    if above is not None and value <= above:
        raise ValueError(f"--{name} must be greater than {above}, not {value}")
    if most is not None and value > most:
        raise ValueError(f"--{name} must be at most {most}, not {value}")


def kind_name(kind: Any) -> str:
    """How `--help` names the type of an option."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return kind_name(next(item for item in typing.get_args(kind) if item is not type(None)))
    if typing.get_origin(kind) is Literal:
        return "|".join(typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"{kind_name(typing.get_args(kind)[0])} ..."
    return {bool: "BOOL", int: "INT", float: "NUMBER", str: "TEXT"}.get(kind, "")
