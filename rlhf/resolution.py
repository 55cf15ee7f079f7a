"""Fills in the defaults that depend on other options, on the model and on the machine."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.config import ALL, LOSSES, Config, reads_answers, reads_prompts, streams
from rlhf.counts import least_ranks, samples, teacher_places
from rlhf.memory import longest_sequence
from rlhf.model_folder import ModelShape

ENGINE_SHARE = 0.9  # of a GPU that is an engine's own
PREFERENCES = ("dpo", "kto", "rm", "gkd")  # their loss_scale is last_round
RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray in the driver of a submitted job
BY_ESTIMATOR = {  # scale_rewards, kl_in_reward
    "grpo": ("group", False),
    "rloo": ("none", True),
    "reinforce_plus_plus": ("batch", True),
}


def resolve(config: Config, shape: ModelShape | None = None, *, gpus_per_node: int = 0) -> Config:
    """`config` with every dependent default filled in; `shape`: the model's, when known. Twice is as once.

    Raises ValueError for what cannot be made consistent.
    """
    if config.task not in ALL:
        return _resolve_engines(config, shape)
    lora = config.tuner_type == "lora"
    values: dict[str, Any] = {
        "lr": _or(config.lr, 1e-4 if lora else 1e-5),
        "merge_lora": _or(config.merge_lora, config.save_safetensors),
        "sequence_parallel": config.sequence_parallel and config.tensor_model_parallel_size > 1,
        "offload_optimizer": _or(config.offload_optimizer, False if config.optimizer_cpu_offload else None),
        "nproc_per_node": _or(config.nproc_per_node, default_nproc(config, gpus_per_node)),
        "output_dir": lasting_folder(config.output_dir or "runs", "output_dir"),
        "dataset": [_absolute_rows(name) for name in config.dataset],
    }
    if config.resume_from_checkpoint not in (None, "auto"):
        values["resume_from_checkpoint"] = lasting_folder(config.resume_from_checkpoint, "resume_from_checkpoint")
    if shape is not None:
        values["torch_dtype"] = config.torch_dtype or trainable_dtype(shape)
    config = replace(config, **values)
    if config.task == "seq_cls":
        config = _resolve_labels(config, shape)
    limit = shape.max_length if shape is not None else None
    return _resolve_grpo(config, limit) if config.task == "grpo" else _resolve_rows(config, limit)


def _resolve_engines(config: Config, shape: ModelShape | None) -> Config:
    """Of the tasks that do not train. The longest prompt leaves room for the longest response, or half of an engine's length."""
    limit = config.vllm_max_model_len or (shape.max_length if shape is not None else None)
    dtype = config.torch_dtype
    if config.task == "rollout" and shape is not None:
        dtype = dtype or trainable_dtype(shape)
    result = config.result_path and lasting_folder(config.result_path, "result_path")
    length = config.max_length or (max(limit - config.max_completion_length, limit // 2, 1) if limit else None)
    return replace(
        config,
        torch_dtype=dtype,
        output_dir=lasting_folder(config.output_dir or "runs", "output_dir"),
        result_path=result,
        dataset=[_absolute_rows(name) for name in config.dataset + config.val_dataset],
        val_dataset=[],
        max_length=length,
        vllm_max_model_len=limit,
        truncation_strategy=config.truncation_strategy or "left",
        vllm_gpu_memory_utilization=config.vllm_gpu_memory_utilization or ENGINE_SHARE,
        stream=streams(config),
        rollout=replace(config.rollout, num_engines=config.rollout.num_engines or 1),
        cosine_max_len=config.cosine_max_len or config.max_completion_length,
        soft_max_length=config.soft_max_length or config.max_completion_length,
        external_plugins=[_absolute(name) for name in config.external_plugins],
    )


def _resolve_rows(config: Config, limit: int | None) -> Config:
    if reads_prompts(config):
        config = _resolve_lengths(config, limit)
    max_length = config.max_length or min(filter(None, (limit, config.packing_length)), default=None)
    return replace(
        config,
        max_length=max_length,
        truncation_strategy=config.truncation_strategy or ("delete" if reads_answers(config) else "left"),
        loss_scale=config.loss_scale or {"pt": "all", **dict.fromkeys(PREFERENCES, "last_round")}.get(config.task, "default"),
        loss_type=config.loss_type or LOSSES.get(config.task, (None,))[0],
        beta=_or(config.beta, 0.5 if config.task == "gkd" else 0.1),
        packing_length=config.packing_length or (max_length if config.packing else None),
        val_dataset=[_absolute_rows(name) for name in config.val_dataset],
        eval_steps=config.eval_steps or config.save_steps,
    )


def _resolve_labels(config: Config, shape: ModelShape | None) -> Config:
    """Labels are those of the model's own head, when it has one."""
    num_labels, kind = config.num_labels, config.problem_type
    if shape is not None:
        num_labels, kind = num_labels or shape.num_labels, kind or shape.problem_type
    if num_labels is None:
        raise ValueError("--num_labels is missing: the number of classes, or 1 for a regression")
    kind = kind or ("regression" if num_labels == 1 else "single_label_classification")
    return replace(config, num_labels=num_labels, problem_type=kind)


def _resolve_grpo(config: Config, limit: int | None) -> Config:
    config = _resolve_lengths(config, limit)
    scale, kl_in_reward = BY_ESTIMATOR[config.advantage_estimator]
    steps, responses = _generation_batch(config)
    return replace(
        config,
        truncation_strategy=config.truncation_strategy or "left",
        loss_type=config.loss_type or LOSSES["grpo"][0],
        beta=_or(config.beta, 0.04),
        epsilon_high=_or(config.epsilon_high, config.epsilon),
        scale_rewards=config.scale_rewards or scale,
        kl_in_reward=_or(config.kl_in_reward, kl_in_reward),
        steps_per_generation=steps,
        generation_batch_size=responses,
        cosine_max_len=config.cosine_max_len or config.max_completion_length,
        soft_max_length=config.soft_max_length or config.max_completion_length,
        external_plugins=[_absolute(name) for name in config.external_plugins],
    )


def _resolve_lengths(config: Config, limit: int | None) -> Config:
    """`limit`: tokens the model takes. The longest prompt leaves room for the longest response."""
    room = config.vllm_max_model_len or limit
    max_length = config.max_length or (max(room - config.max_completion_length, 1) if room else None)
    longest = max_length + config.max_completion_length if max_length else None
    config = replace(
        config,
        max_length=max_length,
        vllm_max_model_len=config.vllm_max_model_len or (min(longest, limit) if longest and limit else None),
    )
    return _packed_at_each_step(config) if config.packing else config


def _packed_at_each_step(config: Config) -> Config:
    """Packs of responses cannot be made before these are sampled: `packing` becomes a token budget of micro batches."""
    length = config.packing_length or (longest_sequence(config) if config.max_length or config.vllm_max_model_len else None)
    if length is None:
        raise ValueError("packing needs --packing_length: the model does not say how long its sequences may be")
    budget = config.micro_batch_size * length
    return replace(config, packing=False, packing_length=None, micro_batch_size=1, micro_batch_tokens=budget)


def _generation_batch(config: Config) -> tuple[int, int]:
    """Optimizer steps a generation batch is split into, and its responses. Raises ValueError when they contradict."""
    batch, steps, responses = config.global_batch_size, config.steps_per_generation, config.generation_batch_size
    if responses is None:
        return steps or 1, batch * (steps or 1)
    if steps is not None and responses != batch * steps:
        raise ValueError(
            f"generation_batch_size {responses} is not global_batch_size {batch} x steps_per_generation {steps} = "
            f"{batch * steps}: give one of them"
        )
    if responses % batch:
        raise ValueError(f"generation_batch_size {responses} must be a multiple of global_batch_size {batch}")
    return responses // batch, responses


def default_nproc(config: Config, gpus_per_node: int) -> int:
    """Policy ranks a node: $NPROC_PER_NODE; else the GPUs that others leave of one node; without GPUs those of one model.

    Others: the engines of vllm_mode server, and a teacher on devices of its own.
    """
    text = os.environ.get("NPROC_PER_NODE")
    if text is not None:
        if text.strip().isdigit() and int(text) > 0:
            return int(text)
        raise ValueError(f"NPROC_PER_NODE={text} in the environment is not a whole number above 0")
    if not gpus_per_node:
        return -(-least_ranks(config) // config.nnodes)
    engines = (config.rollout.num_engines or 1) * config.vllm_tensor_parallel_size
    own = sum(teacher_places(config)) + (engines if samples(config) and config.vllm_mode == "server" else 0)
    return max(gpus_per_node - own * (config.nnodes == 1), 1)


def lasting_folder(path: str, name: str) -> str:
    """`path` as an absolute one.

    A submitted job runs in a copy of the working folder that is deleted afterwards: there a relative path is taken
    under $MEGARAY_OUTPUT_ROOT, and refused without it.
    """
    folder = Path(path).expanduser()
    if folder.is_absolute() or RAY_JOB not in os.environ:
        return str(folder.absolute())
    root = os.environ.get("MEGARAY_OUTPUT_ROOT")
    if root and Path(root).is_absolute():
        return str(Path(root) / folder)
    raise ValueError(
        f"--{name} {path} is relative, but a submitted job runs in a temporary copy of the folder: give an absolute "
        "path on a shared disk, or set MEGARAY_OUTPUT_ROOT to one in the job's runtime environment"
    )


def _absolute(name: str) -> str:
    return str(Path(name).expanduser().absolute())


def _absolute_rows(name: str) -> str:
    """`file.jsonl#500` with an absolute path; anything that is no file here (a hub id) as it is."""
    path, mark, rows = name.partition("#")
    return _absolute(path) + mark + rows if Path(path).expanduser().exists() else name


def trainable_dtype(shape: ModelShape) -> str:
    """The dtype of the model's own weights. ValueError when it is not trained in."""
    if shape.dtype in ("float32", "bfloat16"):
        return shape.dtype
    raise ValueError(f"the model's weights are {shape.dtype}, which is not trained in: give --torch_dtype bfloat16 or float32")


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
