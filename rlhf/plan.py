"""`megaray plan`: batch arithmetic, placement and memory of a run, in words; nothing is started."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rlhf.config import PAIRED, Config
from rlhf.counts import (
    data_ranks,
    expert_copies,
    frozen_group,
    frozen_ranks,
    model_ranks,
    own_places,
    policy_ranks,
    rollout_engines,
    samples,
    teacher_engines,
    teacher_places,
    teacher_width,
    total_steps,
    updates,
)
from rlhf.devices import Devices, find_devices
from rlhf.fit import complete, note, refusal, warning
from rlhf.memory import (
    GIB,
    Memory,
    engine_memory,
    frozen_memory,
    longest_sequence,
    micro_batch_tokens,
    policy_memory,
    responses_at_a_time,
    reward_model_memory,
    shapes,
    stored_logits,
    teacher_engine_memory,
)
from rlhf.model_folder import ModelShape, read_shape
from rlhf.phases import offloaded, phases
from rlhf.pipeline import policy_pipeline
from rlhf.without_gpus import refusal_without_gpus


@dataclass(frozen=True, kw_only=True)
class Role:
    """Processes of one kind: how many, where, and what each holds."""

    name: str
    count: int
    place: str
    devices: int = 1  # of each: as many processes, of an engine's workers
    memory: Memory | None = None  # of one process


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run's arithmetic."""

    parameters: int
    exact: bool  # the parameter count: exact for this architecture, or estimated
    data_size: int
    prompts: int | None  # of one generation batch; None without generation
    micro_batches: int | None  # of one rank and step; None: as many as the token budget needs
    steps: int | None  # None: the dataset's rows are not known
    rows: int | None
    roles: tuple[Role, ...]
    peaks: dict[str, int]  # bytes: of each phase on the fullest GPU; without GPUs {"node": on one node}
    offloaded: int = 0  # bytes of a node's host memory
    notes: tuple[str, ...] = ()  # what memory decided
    refusal: str | None = None  # why this would not be run
    devices: Devices


def print_plan(config: Config) -> int:
    """Print the plan of a checked config; the exit status."""
    made = plan(config, dataset_rows=count_rows(config.dataset, held_out=config.split_dataset_ratio), devices=find_devices())
    print(render(config, made))
    return 0


def plan(config: Config, *, dataset_rows: int | None, devices: Devices) -> Plan:
    """The arithmetic of a resolved config. `dataset_rows`: None when unknown."""
    shape, frozen_shape = shapes(config)
    copies = data_ranks(config)
    roles = _roles(config, shape, frozen_shape)
    room = shape, frozen_shape, devices.memory if devices.gpus else None
    completed = complete(config, *room)
    if devices.gpus:
        peaks = phases(completed, *room)
    else:
        peaks = {"node": sum(role.count * role.devices * role.memory.total for role in roles if role.memory) // config.nnodes}
    known = config.num_train_epochs is None or (dataset_rows is not None and not config.packing)
    return Plan(
        parameters=shape.num_parameters(),
        exact=shape.exact,
        data_size=copies,
        prompts=config.generation_batch_size // config.num_generations if config.task == "grpo" else None,
        micro_batches=None if config.micro_batch_tokens else config.global_batch_size // copies // config.micro_batch_size,
        steps=total_steps(config, dataset_rows) if known else None,
        rows=dataset_rows,
        roles=tuple(roles),
        peaks=peaks,
        offloaded=offloaded(completed, shape, frozen_shape) if devices.gpus else 0,
        notes=tuple(filter(None, [note(config, completed, *room), warning(config, *room)])),
        refusal=refusal(config, *room) if devices.gpus else refusal_without_gpus(config, shape),
        devices=devices,
    )


def _roles(config: Config, shape: ModelShape, frozen_shape: ModelShape | None) -> list[Role]:
    ranks, engines = policy_ranks(config), rollout_engines(config)
    roles = [Role(name="policy", count=ranks, place=_bundles(0, ranks), memory=policy_memory(config, shape))]
    if frozen_shape is not None:
        name, count = frozen_group(config), frozen_ranks(config)
        place = _teachers_own(config) if teacher_places(config) else f"with the policy, {_bundles(0, count)}"
        roles.append(Role(name=name, count=count, place=place, memory=frozen_memory(config, frozen_shape)))
    if config.reward_model is not None:
        place = f"with the policy, {_bundles(0, ranks)}"
        roles.append(Role(name="reward model", count=ranks, place=place, memory=reward_model_memory(config)))
    width = config.vllm_tensor_parallel_size
    if count := teacher_engines(config):
        place, devices = _teachers_own(config), teacher_width(config)
        roles.append(Role(name="teacher", count=count, place=place, devices=devices, memory=teacher_engine_memory(config)))
    if not samples(config):
        return [*roles, Role(name="data", count=1, place="driver's node")]
    shared = config.vllm_mode == "colocate"
    each = config.rollout.engines_per_device
    place = f"with the policy, {_bundles(0, engines // each * width)}" if shared else f"own {_bundles(ranks, engines)}"
    place += f", each on {width} devices" if width > 1 else f", {each} on each device" if each > 1 else ""
    roles.append(Role(name="rollout", count=engines, place=place, devices=width, memory=engine_memory(config, shape)))
    if config.task == "grpo":
        roles.append(Role(name="reward", count=config.reward_workers, place="any node"))
    return [*roles, Role(name="data", count=1, place="driver's node")]


def _teachers_own(config: Config) -> str:
    """The places after the policy's and those of engines that have their own."""
    first = policy_ranks(config) + rollout_engines(config) * own_places(config)
    return f"own {_bundles(first, len(teacher_places(config)))}"


def _bundles(first: int, count: int) -> str:
    return f"bundle {first}" if count == 1 else f"bundles {first}-{first + count - 1}"


def count_rows(dataset: list[str], *, held_out: float = 0.0) -> int | None:
    """Rows of local .jsonl files, `#N` taken, less the share `held_out` of each; None when one of them is something else."""
    total = 0
    for name in dataset:
        path, _, limit = name.partition("#")
        if limit.isdigit():
            rows = int(limit)
        elif path.endswith(".jsonl") and Path(path).is_file():
            with open(path, "rb") as lines:
                rows = sum(1 for line in lines if line.strip())
        else:
            return None
        total += rows - (max(int(rows * held_out), 1) if held_out else 0)  # as ms-swift rounds
    return total


def render(config: Config, made: Plan) -> str:
    """The plan as text."""
    lines = [*_model_lines(config, made), "", "Batches", *(f"  {line}" for line in _batch_lines(config, made))]
    lines += ["", "Placement", *(f"  {line}" for line in _place_lines(config, made))]
    return "\n".join([*lines, "", *_memory_lines(config, made)])


def _model_lines(config: Config, made: Plan) -> list[str]:
    about = "" if made.exact else " (estimated: this architecture is not one of those counted exactly)"
    return [
        f"{config.task} on {config.model}: {made.parameters:,} parameters{about}, {config.torch_dtype}",
        f"this machine: {made.devices.name}",
    ]


def _batch_lines(config: Config, made: Plan) -> list[str]:
    each, ranks, batch = model_ranks(config), policy_ranks(config), config.global_batch_size
    tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    unit = "packs" if config.packing else "responses" if config.task == "grpo" else "pairs" if config.task in PAIRED else "rows"
    lines = [f"{ranks} policy ranks / (TP {tensor} x PP {pipeline} = {each}) = {made.data_size} data-parallel"]
    stages = policy_pipeline(config).stages(read_shape(Path(config.model)).num_layers)
    if len(set(stages)) > 1:
        lines.append(f"layers of the {pipeline} stages: {', '.join(map(str, stages))}")
    if config.expert_model_parallel_size * config.expert_tensor_parallel_size > 1:
        size, tensor_size = config.expert_model_parallel_size, config.expert_tensor_parallel_size
        lines.append(f"experts over {size} ranks, each over {tensor_size}: {expert_copies(config)} copies of each")
    if made.micro_batches is None:
        lines.append(f"global batch {batch} {unit}, packed to {config.micro_batch_tokens} tokens a micro batch")
    else:
        lines.append(
            f"global batch {batch} {unit} / DP {made.data_size} / micro batch {config.micro_batch_size} = "
            f"{made.micro_batches} micro batches a rank and step"
        )
    if config.task == "gkd":
        lines += _distillation_lines(config)
    if made.prompts is not None:
        lines.append(
            f"generation: {batch} x steps_per_generation {config.steps_per_generation} = "
            f"{config.generation_batch_size} responses / num_generations {config.num_generations} = "
            f"{made.prompts} prompts, for {updates(config)} steps"
        )
    rows = "unknown number of" if made.rows is None else f"{made.rows:,}"
    steps = f"unknown until the dataset is {'packed' if config.packing else 'read'}" if made.steps is None else f"{made.steps:,}"
    length = f"{config.num_train_epochs} epochs of {rows} rows" if config.num_train_epochs else f"train_iters, {rows} rows"
    return [*lines, f"optimizer steps: {steps} ({length}); a checkpoint every {config.save_steps}"]


def _distillation_lines(config: Config) -> list[str]:
    other = "the teacher's own" if config.seq_kd else "the dataset's"
    share = f"{config.lmbda:.0%} of the steps on the policy's own responses, the others on {other}"
    each = stored_logits(config, read_shape(Path(config.teacher.model)))
    return [share, f"teacher's logits: {each:,} bytes a trained token in Ray's object store, until the end of its step"]


def _place_lines(config: Config, made: Plan) -> list[str]:
    lines = [f"{role.name:<12} {role.count} x  {role.place}" for role in made.roles]
    kind, each = ("GPU", 1) if made.devices.gpus else ("CPU", config.cpus_per_rank)
    have = made.devices.gpus or made.devices.cores
    bundles = Counter({1: policy_ranks(config)})  # by size in places
    if own_places(config):
        bundles[config.vllm_tensor_parallel_size] += rollout_engines(config)
    bundles.update(teacher_places(config))
    wanted = sum(count * size * each for size, count in bundles.items())
    text = " and ".join(f"{count} bundle{'s' * (count > 1)} of {size * each:g} {kind}" for size, count in bundles.items())
    return [*lines, text + ("" if config.nnodes > 1 or wanted <= have else f": more than the {have} here")]


def _memory_lines(config: Config, made: Plan) -> list[str]:
    columns = ("weights", "gradients", "optimizer", "activations", "kv_cache", "total")
    held = [role for role in made.roles if role.memory]
    head = f"{'Memory, GiB a process':<24}" + "".join(f"{name:>13}" for name in columns)
    rows = [f"  {role.name:<22}" + "".join(f"{_gib(getattr(role.memory, name)):>13}" for name in columns) for role in held]
    tokens = micro_batch_tokens(config)
    notes = [f"  activations: micro batches of {tokens:,} tokens, recompute {config.recompute_granularity}"]
    if samples(config):
        at_a_time, longest = responses_at_a_time(config), longest_sequence(config)
        notes.append(f"  kv_cache: {at_a_time} responses at a time, each of {longest:,} tokens")
    return [head, *rows, *notes, *_peak_lines(made)]


def _peak_lines(made: Plan) -> list[str]:
    have = made.devices.memory
    if not made.devices.gpus:
        verdict = "" if made.peaks["node"] <= have else ": too much"
        refused = ["", f"This would be refused here: {made.refusal}"] if made.refusal else []
        return [f"  about {_gib(made.peaks['node'])} GiB on a node of {_gib(have)}{verdict} (libraries not counted)", *refused]
    lines = [f"  {phase:<22}{_gib(size):>13}{'' if size <= have else '  too much'}" for phase, size in made.peaks.items()]
    if made.offloaded:
        lines.append(f"  {'host memory of a node':<22}{_gib(made.offloaded):>13} for what is offloaded")
    lines += [f"  {text}" for text in made.notes]
    refused = ["", f"This would be refused: {made.refusal}"] if made.refusal else []
    return ["", f"Predicted peak of the fullest GPU, GiB of {_gib(have)}", *lines, *refused]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size >= GIB / 100 else f"{size / GIB:.4f}"
