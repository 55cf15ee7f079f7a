"""Command line and YAML to a typed `Config`: parsing, types, bounds, and what is refused by name."""

from __future__ import annotations

import functools
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from rlhf import inference_check
from rlhf.adapter import with_adapter
from rlhf.config import ALL, DEFAULTS, Config, FrozenRole, RolloutRole, Task, TeacherRole
from rlhf.devices import find_devices
from rlhf.export_check import complete_export
from rlhf.megatron_folder import check_described, find_whole_megatron
from rlhf.model_folder import local_model, read_shape
from rlhf.option_values import check_bounds, closest, kind_name, nearest, typed, untyped
from rlhf.resolution import resolve
from rlhf.unsupported import ELSEWHERE, UNSUPPORTED
from rlhf.validation import check_parsed, validate
from rlhf.variables import read_environment

ROLES = {"rollout": RolloutRole, "reference": FrozenRole, "teacher": TeacherRole}
FROZEN = ("reference", "teacher")
PASS_THROUGH = ("megatron", "vllm")
ALIASES = {"ref_model": "reference.model", "teacher_model": "teacher.model", "max_new_tokens": "max_completion_length"}
# The first word of a command, the option that then names the task (its default first), and the task of each value.
COMMANDS: dict[str, tuple[str | None, dict[str | None, Task]]] = {
    "pt": (None, {None: "pt"}),
    "sft": (
        "task_type",
        {
            "causal_lm": "sft",
            "seq_cls": "seq_cls",
            "embedding": "embedding",
            "reranker": "reranker",
            "generative_reranker": "generative_reranker",
        },
    ),
    "rlhf": ("rlhf_type", {"dpo": "dpo", "kto": "kto", "rm": "rm", "gkd": "gkd", "grpo": "grpo"}),
    "infer": (None, {None: "infer"}),
    "eval": (None, {None: "eval"}),
    "rollout": (None, {None: "rollout"}),
    "export": (None, {None: "export"}),
}
TRAINING = tuple(command for command, (_, tasks) in COMMANDS.items() if set(tasks.values()) <= set(ALL))

USAGE = """usage: megaray pt|sft|rlhf [--config FILE.yaml] [--NAME VALUE ...]
       megaray infer|eval [...]                      questions answered; responses to a dataset scored
       megaray rollout [...]                         engines for `rlhf --vllm_mode server` in another terminal
       megaray export [...]                          a model from Hugging Face's format to Megatron's, or back
       megaray plan pt|sft|rlhf [the same options]   batches, placement and memory; nothing is started
       megaray check                                 the environment, and the command that mends what is missing
       megaray [pt|sft|rlhf [--task_type TYPE | --rlhf_type TYPE]|infer|eval|rollout|export] --help
task_type (sft): causal_lm (the default), seq_cls, embedding, reranker or generative_reranker
rlhf_type (rlhf): dpo (the default), kto, rm, gkd or grpo"""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One supported option: `owner` is None, or the role whose section holds it."""

    name: str  # as typed: "lr", "rollout.num_engines"
    field: Field
    type: Any
    owner: str | None

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.field.metadata["tasks"]


@functools.cache
def supported() -> dict[str, Option]:
    """Every supported option by the name it is typed with."""
    table = {}
    for owner, section in ((None, Config), *ROLES.items()):
        hints = typing.get_type_hints(section)
        for item in fields(section):
            if "help" in item.metadata:
                name = f"{owner}.{item.name}" if owner else item.name
                table[name] = Option(name=name, field=item, type=hints[item.name], owner=owner)
    return table


def load_config(argv: Sequence[str], *, weights: bool = True) -> Config:
    """The checked config of a command line: parsed, its model found, every default filled in; notes go to stderr.

    `weights` false: nothing will be run, so of a hub id only the JSON files are fetched. Raises ValueError, one line,
    for whatever its user must mend.
    """
    config = parse(argv)
    if config.task == "export":
        return complete_export(config)
    trains = config.task in ALL
    if config.adapters:
        config = with_adapter(config)
    check_parsed(config) if trains else inference_check.check_parsed(config)
    megatron = None if config.mcore_model is None else str(find_whole_megatron(config.mcore_model))
    if config.model is None:
        check_described(Path(megatron))
    folder = local_model(config.model or megatron, use_hf=config.use_hf, weights=weights)
    config = replace(config, model=str(folder), mcore_model=megatron, environment=read_environment(config.task))
    for name in FROZEN:
        role = getattr(config, name)
        if role.model is not None:
            local = local_model(role.model, use_hf=config.use_hf, weights=weights, option=f"{name}.model")
            config = replace(config, **{name: replace(role, model=str(local))})
    if config.reward_model is not None:
        reward_model = local_model(config.reward_model, use_hf=config.use_hf, weights=weights, option="reward_model")
        config = replace(config, reward_model=str(reward_model))
    config = resolve(config, read_shape(folder), gpus_per_node=find_devices().gpus)
    if not trains:
        inference_check.validate(config)
        return config
    for note in validate(config, weights=weights):
        print(f"note: {note}", file=sys.stderr)
    return config


def parse(argv: Sequence[str]) -> Config:
    """Read `[plan] TASK [--config FILE] [--NAME VALUE ...]`.

    The command line wins over the file, a later value over an earlier one. Raises ValueError, one line, for anything
    that cannot be understood.
    """
    words = list(argv[1:] if argv[:1] == ["plan"] else argv)
    command = words.pop(0) if words else ""
    there_are = f"{', '.join(COMMANDS)}, plan or check"
    if command not in COMMANDS:
        options = [f": write megaray {word} --{name} {command}" for word, (name, tasks) in COMMANDS.items() if command in tasks]
        hint = options[0] if options else nearest(command, COMMANDS)
        raise ValueError(f"the first word is {there_are}, not {command!r}{hint}")
    if argv[:1] == ["plan"] and command not in TRAINING:
        raise ValueError(f"there is no plan of {command}: plan is for {', '.join(TRAINING[:-1])} and {TRAINING[-1]}")
    given = _tokens(words)
    values: dict[str, Any] = {}
    if given.get("config") == []:
        raise ValueError("--config needs a file: --config FILE.yaml")
    for path in given.pop("config", []):
        values |= _flatten(_read_yaml(path))
    values |= given
    task = _task(command, values)
    config = Config(task=task, **DEFAULTS.get(task, {}))
    for name, value in values.items():
        config = _with_option(config, name, value)
    return config


def _task(command: str, values: dict[str, Any]) -> Task:
    """The task of a command; takes the option that names it out of `values`."""
    name, tasks = COMMANDS[command]
    for other, (selector, _) in COMMANDS.items():
        if other != command and selector in values:
            raise ValueError(f"--{selector} belongs to {other}: write megaray {other} --{selector} {' '.join(values[selector])}")
    value = typed(name, str, values.pop(name)) if name in values else next(iter(tasks))
    if value not in tasks:
        raise ValueError(f"--{name} {value}: choose from {', '.join(tasks)}" + nearest(value, tasks))
    return tasks[value]


def _tokens(words: Sequence[str]) -> dict[str, list[str]]:
    """`--name a b --flag --other=c` as {name: [a, b], flag: [], other: [c]}, '-' in names read as '_'."""
    given: dict[str, list[str]] = {}
    name = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            given.pop(name, None)  # the last one wins, and keeps its place
            given[name] = [value] if equals else []
        elif name is None:
            raise ValueError(f"expected an option that starts with --, not {word!r}")
        else:
            given[name].append(word)
    return given


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if isinstance(values, dict):
        return values
    raise ValueError(f"--config {path}: expected lines of `name: value`, found a {type(values).__name__}")


def _flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Sections `rollout:`, `reference:`, `teacher:`, `megatron:`, `vllm:` as dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in (*ROLES, *PASS_THROUGH) and isinstance(value, dict):
            flat |= {f"{name}.{str(inner).replace('-', '_')}": inner_value for inner, inner_value in value.items()}
        else:
            flat[name] = value
    return flat


def _with_option(config: Config, name: str, value: Any) -> Config:
    """`config` with one option set. `value`: a list of words from the command line, or what YAML gave."""
    name = ALIASES.get(name, name)
    section, _, inner = name.partition(".")
    if section in PASS_THROUGH and inner:
        _check_task(supported()[section], config.task)
        return replace(config, **{section: {**getattr(config, section), inner: untyped(value)}})
    if name in UNSUPPORTED:
        return _harmless(config, name, value)
    option = supported().get(name)
    if option is None or section in PASS_THROUGH:
        raise ValueError(_unknown(name, config.task))
    _check_task(option, config.task)
    value = typed(option.name, option.type, value)
    check_bounds(option.name, option.field.metadata, value)
    if option.owner:
        return replace(config, **{option.owner: replace(getattr(config, option.owner), **{option.field.name: value})})
    return replace(config, **{name: value})


def _check_task(option: Option, task: str) -> None:
    if task not in option.tasks:
        raise ValueError(f"--{option.name} is not used by {task}; it belongs to {', '.join(option.tasks)}")


def _harmless(config: Config, name: str, value: Any) -> Config:
    """`config` itself when the value asks for nothing; otherwise the refusal."""
    known = UNSUPPORTED[name]
    if untyped(value) in known.harmless:
        return config
    text = " or ".join(str(item).lower() if isinstance(item, bool) else str(item) for item in known.harmless)
    only = f" (only {text} is)" if text else ""
    raise ValueError(f"option --{name} is known but not supported{only}: {known.reason}")


def _unknown(name: str, task: str) -> str:
    if name in ELSEWHERE:
        return f"unknown option --{name}; here it is --{ELSEWHERE[name]}"
    if name in (*ROLES, *PASS_THROUGH):
        return f"--{name} is a section: write --{name}.NAME VALUE"
    names = {option.name: option.name for option in supported().values() if task in option.tasks}
    typed_elsewhere = {other: here for other, here in ELSEWHERE.items() if here in names}
    known = typed_elsewhere | names
    found = closest(name, known)
    return f"unknown option --{name}; " + (f"did you mean --{known[found]}?" if found else "--help lists them")


def help_of(argv: Sequence[str]) -> str:
    """What `--help` prints: the options of the task that the rest of the command line names, else all."""
    words = [word for word in argv if word not in ("-h", "--help", "plan")]
    if not words or words[0] not in COMMANDS:
        return help_text()
    try:
        return help_text(_task(words[0], _tokens(words[1:])))
    except ValueError:
        return help_text()


def help_text(task: Task | None = None) -> str:
    """All options of `task` (None: of every task), grouped, each with its type, default and meaning."""
    groups = [cls for cls in reversed(Config.__mro__) if "__dataclass_fields__" in vars(cls)]
    groups[-1:-1] = list(ROLES.values())
    lines = [USAGE]
    for group in groups:
        options = [item for item in supported().values() if _group_of(item) is group and (not task or task in item.tasks)]
        if options:
            lines += ["", f"{group.__doc__}:"] + [_help_line(item, DEFAULTS.get(task, {})) for item in options]
    return "\n".join(lines)


def _group_of(option: Option) -> type:
    if option.owner:
        return ROLES[option.owner]
    return next(cls for cls in Config.__mro__ if option.field.name in vars(cls).get("__annotations__", {}))


def _help_line(option: Option, defaults: Mapping[str, Any]) -> str:
    """`defaults`: those of the task, where they differ."""
    default = option.field.default_factory() if callable(option.field.default_factory) else option.field.default
    default = defaults.get(option.name, default)
    shown = " ".join(map(str, default)) if isinstance(default, (list, dict)) else default
    shown = str(shown).lower() if isinstance(shown, bool) else shown
    tail = f" [{shown}]" if shown not in (None, "") else ""
    return f"  --{option.name} {kind_name(option.type)}".ljust(44) + f"  {option.field.metadata['help']}{tail}"
