"""Finds reward functions by name: the user's plug-ins first, then those built in.

A plug-in file may hold, unchanged, an ms-swift `ORM` or `AsyncORM` class registered in `swift.rewards.orms`, or a
function `f(completions, **columns) -> list[float]` as TRL takes it. `check` and `check_config` are for the controller:
they import no plug-in themselves.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards.calling import RewardFunction

BUILT_IN = {  # name, also of the file here: the function or class in it
    "accuracy": "Accuracy",
    "cosine": "Cosine",
    "format": "think_then_answer",
    "repetition": "Repetition",
    "soft_overlong": "SoftOverlong",
}
IMPORT_SECONDS = 60  # for all plug-ins together


def check(reward_funcs: Sequence[str], external_plugins: Sequence[str] = (), *, seconds: float = IMPORT_SECONDS) -> None:
    """Raise a one-line ValueError if a name is unknown or a plug-in does not import within `seconds`.

    Plug-ins are imported in a process of their own.
    """
    if not reward_funcs:
        raise ValueError(
            f"no reward function: give --reward_funcs, one or more of {', '.join(BUILT_IN)}, or names from --external_plugins"
        )
    for name in reward_funcs:
        if list(reward_funcs).count(name) > 1:
            raise ValueError(f"reward function {name!r} is given twice: give it once, and its weight")
    for path in external_plugins:
        if not Path(path).expanduser().is_file():
            raise ValueError(f"plug-in file {path} does not exist (--external_plugins, looked for from {os.getcwd()})")
    defined = _names_of_plugins(reward_funcs, external_plugins, seconds) if external_plugins else []
    available = sorted({*BUILT_IN, *defined})
    for name in reward_funcs:
        if name not in available:
            nearest = difflib.get_close_matches(name, available, n=1)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise ValueError(f"unknown reward function {name!r}: {hint}Available: {', '.join(available)}")


def check_config(config: Any) -> None:
    """As `check`, and the reward weights and the options of the built-in functions in use. Raises ValueError."""
    names, weights = config.reward_funcs or (), config.reward_weights
    count = len(names) + (config.reward_model is not None)
    if weights is not None and len(weights) != count:
        rewards = f"{len(names)} reward_funcs" + (" and a reward model" if config.reward_model else "")
        raise ValueError(f"{len(weights)} reward_weights for {rewards}: give one weight for each")
    if config.reward_model is not None and not names:
        return
    check(names, config.external_plugins or ())
    if not config.external_plugins:  # a plug-in may replace a built-in of the same name
        for name in names:
            _built_in(name, config)


def load(config: Any) -> dict[str, RewardFunction]:
    """The reward functions of `config`, ready to be called, in order. Whatever a plug-in's import raises propagates."""
    modules = [import_plugin(path) for path in config.external_plugins or ()]
    return {name: _find(name, modules, config) for name in config.reward_funcs}


def import_plugin(path: str) -> ModuleType:
    """Import one plug-in file; files beside it can be imported by it."""
    file = Path(path).expanduser().resolve()
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    name = f"reward_plugin_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def names_defined(modules: Sequence[ModuleType], wanted: Sequence[str]) -> list[str]:
    """What plug-ins offer: registered ORMs, public functions of the files, and those of `wanted` that they import."""
    names = set(_registered_orms())
    for module in modules:
        names.update(name for name in wanted if callable(getattr(module, name, None)))
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                names.add(name)
    return sorted(names)


def _find(name: str, modules: Sequence[ModuleType], config: Any) -> RewardFunction:
    orm = _registered_orms().get(name)
    if orm is not None:
        return RewardFunction(name, _constructed(orm, config), is_orm=True)
    for module in modules:
        target = getattr(module, name, None)
        if inspect.isclass(target):
            return RewardFunction(name, _constructed(target, config), is_orm=True)
        if callable(target):
            return RewardFunction(name, target)
    target = _built_in(name, config)
    if hasattr(target, "warm_up"):
        target.warm_up()
    return RewardFunction(name, target)


def _registered_orms() -> dict[str, Any]:
    """What plug-ins have put into ms-swift's table, without ms-swift's own entries."""
    swift = sys.modules.get("swift.rewards.orm")  # absent unless a plug-in imported it
    table = swift.orms if swift else {}
    return {name: orm for name, orm in table.items() if getattr(orm, "__module__", "") != swift.__name__}


def _constructed(target: Any, config: Any) -> Any:
    """An ORM object; ms-swift gives its arguments as `args`, which a constructor may leave out."""
    if not inspect.isclass(target):
        return target
    parameters = inspect.signature(target).parameters.values()
    takes_args = any(p.name == "args" or p.kind == p.VAR_KEYWORD for p in parameters)
    return target(args=config) if takes_args else target()


def _built_in(name: str, config: Any) -> Any:
    if name not in BUILT_IN:
        raise ValueError(f"no reward function {name!r} is built in or in the plug-ins")
    target = getattr(importlib.import_module(f"rewards.{name}"), BUILT_IN[name])
    return target(config) if inspect.isclass(target) else target


def _names_of_plugins(reward_funcs: Sequence[str], paths: Sequence[str], seconds: float) -> list[str]:
    """Import the plug-ins in a process of their own, so that one that hangs or exits costs no more than an error."""
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-m", "rewards.plugin_names", folder, json.dumps(list(reward_funcs)), *paths]
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        child = subprocess.Popen(command, env=environment, start_new_session=True, **quiet)
        try:
            ended = f"ended the process (exit code {child.wait(timeout=seconds)}) while it was imported"
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # its own session: also what the plug-in has started
            child.wait()
            ended = f"did not import within {seconds:.0f} s"
        answer, importing = Path(folder, "names.json"), Path(folder, "importing")
        current = importing.read_text() if importing.exists() else paths[0]
        if not answer.exists():
            raise ValueError(f"plug-in {current} {ended} (--external_plugins)")
        result = json.loads(answer.read_text())
    if "error" in result:
        raise ValueError(f"plug-in {current} does not import: {result['error']}")
    return result["names"]
