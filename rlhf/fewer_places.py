"""What to change in a run for which a cluster has too few GPUs or cores: options that the run has, where lower values help."""

from __future__ import annotations

from dataclasses import replace

from rlhf.config import ALL, Config
from rlhf.counts import least_ranks, policy_ranks, teacher_devices, teacher_engines, teacher_places, teacher_width


def with_less(config: Config, kind: str, *, engine_places: int) -> str:
    """The advice, for a resolved config and a `kind` of Ray's resources; `engine_places`: engines that share no rank's place."""
    options = _of_policy(config) if policy_ranks(config) else []
    options += _of_engines(config, engine_places) if engine_places else []
    options += _of_teacher(config) if teacher_places(config) else []
    options += ["cpus_per_rank"] if kind == "CPU" else []
    if not options:
        return "add nodes"
    *others, last = options
    return f"lower {', '.join(others)} or {last}, or add nodes" if others else f"lower {last}, or add nodes"


def _of_policy(config: Config) -> list[str]:
    """Those that set the number of copies; of one copy alone those that split it, with the ranks that they need."""
    if policy_ranks(config) > least_ranks(config):
        return [name for name in ("nproc_per_node", "nnodes") if getattr(config, name) > 1]
    names = [f"{axis}_parallel_size" for axis in ("tensor_model", "pipeline_model", "expert_model", "expert_tensor")]
    helps = [name for name in names if least_ranks(replace(config, **{name: 1})) < least_ranks(config)]
    ranks = "nproc_per_node with " if config.task in ALL else ""  # a conversion has as many as it needs
    return [f"{ranks}{name}" for name in helps]


def _of_engines(config: Config, count: int) -> list[str]:
    sizes = {"rollout.num_engines": count, "vllm_tensor_parallel_size": config.vllm_tensor_parallel_size}
    return [name for name, size in sizes.items() if size > 1]


def _of_teacher(config: Config) -> list[str]:
    if sum(teacher_places(config)) > teacher_devices(config):
        return ["teacher.nproc"]
    sizes = {"tensor": teacher_width(config)}
    if not teacher_engines(config):
        sizes["pipeline"] = teacher_devices(config) // teacher_width(config)
    ranks = "teacher.nproc with " if config.teacher.nproc else ""
    return [f"{ranks}teacher.{axis}_model_parallel_size" for axis, size in sizes.items() if size > 1]
