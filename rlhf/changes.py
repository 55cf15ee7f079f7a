"""Changes of a run's options that make it take less of a GPU. `rlhf.fit` tries them, and proposes those that help."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rlhf.config import Config
from rlhf.counts import data_ranks, frozen_group, policy_ranks, samples, teacher_places, teacher_width
from rlhf.engine_check import check_width
from rlhf.layout_check import check_layout
from rlhf.memory import longest_sequence
from rlhf.model_folder import ModelShape
from rlhf.phases import shares_gpus
from rlhf.pipeline import Pipeline, frozen_pipeline, policy_pipeline

SHORTEST = 256  # tokens: shorter sequences are not proposed


def possible_changes(
    config: Config, shape: ModelShape, frozen_shape: ModelShape | None, *, share: float
) -> Iterator[list[dict[str, Any]]]:
    """Changes worth a try, by kind; those of a kind go further one after another.

    `share`: of a GPU, what its engines would get if vllm_gpu_memory_utilization were not given.
    """
    if shares_gpus(config):
        refused = [name for name in ("offload_optimizer", "offload_model") if getattr(config, name) is False]
        yield [{name: True} for name in refused] + [dict.fromkeys(refused, True)] * (len(refused) == 2)
    own = bool(teacher_places(config))
    if frozen_group(config) == "teacher" and not (own or config.offload_teacher_model):
        yield [{"offload_teacher_model": True}]
        yield [{"teacher.own_devices": True}]
    if config.vllm_gpu_memory_utilization is not None:
        yield [{"vllm_gpu_memory_utilization": share}]
    alone = _alone(config)
    if alone:
        yield [alone]
    if config.micro_batch_tokens:
        longest = longest_sequence(config)
        yield [{"micro_batch_tokens": max(size, longest)} for size in _halves(config.micro_batch_tokens, longest)]
    elif config.micro_batch_size > 1:
        yield [{"micro_batch_size": size} for size in _halves(config.micro_batch_size, 1)]
    if config.recompute_granularity != "full":
        yield [{"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}]
    yield [_shortened(config, length) for length in _halves(config.max_length or 0, SHORTEST)]
    names, size = ("tensor_model_parallel_size", "nproc_per_node"), config.tensor_model_parallel_size
    ranks = {"ranks": policy_ranks(config), "nodes": config.nnodes}
    yield _more_tensor_ranks(shape, policy_pipeline(config), now=size, names=names, **ranks)
    if frozen_shape and own:
        names, role = ("teacher.tensor_model_parallel_size", "teacher.nproc"), config.teacher
        layout, size = frozen_pipeline(config, role), teacher_width(config)
        yield _more_tensor_ranks(frozen_shape, layout, now=size, names=names, ranks=role.nproc or 0)
    yield [alone | change for change in _wider_engines(config, shape)]
    yield _more_expert_ranks(config, shape)
    if not config.use_distributed_optimizer and data_ranks(config) > 1:
        yield [{"use_distributed_optimizer": True}]
    elif config.use_distributed_optimizer:
        yield [{"nnodes": config.nnodes * factor} for factor in (2, 4, 8)]


def changed(config: Config, change: dict[str, Any]) -> Config:
    """`config` with other values of these options, of which some are a role's."""
    for name, value in change.items():
        role, _, option = name.rpartition(".")
        config = replace(config, **{role: replace(getattr(config, role), **{option: value})} if role else {option: value})
    return config


def in_words(change: dict[str, Any]) -> str:
    """`name value, name value`, as they are told."""
    shown = {name: str(value).lower() if isinstance(value, bool) else value for name, value in change.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _halves(size: int, least: int) -> list[int]:
    """size / 2, size / 4, ... until `least` is reached."""
    halves = []
    while size > least:
        size = size // 2
        halves.append(size)
    return halves


def _shortened(config: Config, length: int) -> dict[str, Any]:
    change: dict[str, Any] = {"max_length": length}
    if config.packing:
        change["packing_length"] = length
    if config.vllm_max_model_len:
        change["vllm_max_model_len"] = min(config.vllm_max_model_len, length + config.max_completion_length)
    return change


def _more_tensor_ranks(
    shape: ModelShape, pipeline: Pipeline, *, now: int, ranks: int, names: tuple[str, str], nodes: int = 1
) -> list[dict[str, Any]]:
    """TP of 2, 4 and 8 where a model without experts divides, on as many ranks of a node as it takes; `names` of the options."""
    changes = []
    for tensor in () if shape.experts else (2, 4, 8):
        try:
            check_layout(shape, tensor, pipeline)
        except ValueError:
            continue
        if tensor > now:
            each = tensor * pipeline.size
            changes.append(dict(zip(names, (tensor, -(-each // nodes)) if ranks % each else (tensor,))))
    return changes


def _alone(config: Config) -> dict[str, Any]:
    """One engine on each device; nothing where that is so."""
    each, engines = config.rollout.engines_per_device, config.rollout.num_engines
    if each == 1:
        return {}
    return ({"rollout.num_engines": engines // each} if engines else {}) | {"rollout.engines_per_device": 1}


def _wider_engines(config: Config, shape: ModelShape) -> list[dict[str, Any]]:
    """Engines on 2, 4 and 8 devices where that divides the model, and the policy's ranks of a node if they share those."""
    changes = []
    for width in (2, 4, 8):
        change = {"vllm_tensor_parallel_size": width}
        if not samples(config) or shares_gpus(config) and config.nproc_per_node % width:
            continue
        try:
            check_width(config, shape, width, "vllm_tensor_parallel_size")
        except ValueError:
            continue
        if (config.rollout.num_engines or 0) * width > policy_ranks(config) and shares_gpus(config):
            change["rollout.num_engines"] = policy_ranks(config) // width
        if width > config.vllm_tensor_parallel_size:
            changes.append(change)
    return changes


def _more_expert_ranks(config: Config, shape: ModelShape) -> list[dict[str, Any]]:
    """EP of 2, 4 and 8 where it divides the experts, on as many ranks as it takes."""
    changes = []
    for size in (2, 4, 8):
        if shape.experts and size > config.expert_model_parallel_size and shape.experts.count % size == 0:
            change = {"expert_model_parallel_size": size}
            ranks = math.lcm(size * config.expert_tensor_parallel_size, config.tensor_model_parallel_size)
            ranks *= config.pipeline_model_parallel_size
            if policy_ranks(config) % ranks:
                change |= {"nproc_per_node": -(-ranks // config.nnodes)}
            changes.append(change)
    return changes
