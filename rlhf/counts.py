"""How many: ranks, copies of the policy, engines, optimizer steps of a resolved config."""

from __future__ import annotations

from math import ceil

from rlhf.config import TRAIN, Config


def policy_ranks(config: Config) -> int:
    """Policy ranks of the run: nnodes x nproc_per_node of a resolved config; 0 when the task does not train."""
    if config.task not in TRAIN:
        return 0
    assert config.nproc_per_node is not None, "resolve the config first"
    return config.nnodes * config.nproc_per_node


def model_ranks(config: Config) -> int:
    """Ranks that hold one copy of the policy: TP x PP."""
    return config.tensor_model_parallel_size * config.pipeline_model_parallel_size


def data_ranks(config: Config) -> int:
    """DP: copies of the policy."""
    return policy_ranks(config) // model_ranks(config)


def rollout_engines(config: Config) -> int:
    """vLLM engines of the run; 0 when the task generates nothing."""
    if config.task == "sft":
        return 0
    if config.rollout.num_engines is not None:
        return config.rollout.num_engines
    return policy_ranks(config) // config.vllm_tensor_parallel_size if config.vllm_mode == "colocate" else 1


def own_places(config: Config) -> bool:
    """Whether engines have places (GPUs, or cores) of their own, instead of the policy's."""
    return config.task not in TRAIN or (config.task == "rlhf" and config.vllm_mode == "server")


def needs_reference(config: Config) -> bool:
    """Whether a frozen reference group runs beside the policy (with LoRA the policy serves, its adapter disabled)."""
    return config.task == "rlhf" and bool(config.beta) and config.tuner_type == "full"


def total_steps(config: Config, num_rows: int) -> int:
    """Optimizer steps of the run: num_train_epochs over the dataset's `num_rows`, else train_iters."""
    if config.num_train_epochs is None:
        return config.train_iters
    if config.task == "sft":
        return ceil(config.num_train_epochs * num_rows / config.global_batch_size)
    prompts = config.generation_batch_size // config.num_generations
    return ceil(config.num_train_epochs * num_rows / prompts) * config.steps_per_generation * config.num_iterations
