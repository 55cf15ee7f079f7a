"""What can be wrong with rollout engines: their options, and what a policy that is trained on their responses asks of them."""

from __future__ import annotations

from rlhf.config import Config
from rlhf.counts import policy_ranks, rollout_engines, teacher_devices, teacher_places
from rlhf.layout_check import check_tensor_split
from rlhf.model_folder import ModelShape


def check_engines(config: Config, shape: ModelShape) -> None:
    """What every task with engines needs. Raises ValueError."""
    if config.truncation_strategy == "right":
        raise ValueError("truncation_strategy right would cut the question's end: use left or delete")
    if config.top_k == 0:
        raise ValueError("top_k 0 leaves no token: use -1 for all")
    check_width(config, shape, config.vllm_tensor_parallel_size, "vllm_tensor_parallel_size")
    limit = config.vllm_max_model_len
    if limit and shape.max_length and limit > shape.max_length:
        raise ValueError(f"vllm_max_model_len {limit} is more than the model's limit of {shape.max_length} tokens")


def check_teacher_engines(config: Config, shape: ModelShape) -> None:
    """Those that answer by the teacher (seq_kd), whose `shape` it is: on its own places or the policy's. Raises ValueError."""
    if teacher_places(config):
        name = "seq_kd answers in engines on the devices of one copy of the teacher, TP x PP:"
        return check_width(config, shape, teacher_devices(config), name)
    check_width(config, shape, config.vllm_tensor_parallel_size, "the teacher: vllm_tensor_parallel_size")
    width, ranks = config.vllm_tensor_parallel_size, policy_ranks(config)
    if width > ranks:
        raise ValueError(
            f"vllm_tensor_parallel_size {width} is more than the {ranks} policy ranks on whose places the teacher answers"
        )


def check_width(config: Config, shape: ModelShape, width: int, option: str) -> None:
    """Whether a model can be split over the `width` devices of an engine; `option` says how many. Raises ValueError."""
    name = f"{option} {width}"
    check_tensor_split(shape, width, name)
    if shape.experts and shape.experts.ffn_size % width and not config.vllm.get("enable_expert_parallel"):
        raise ValueError(f"{name} does not divide the model's moe_intermediate_size {shape.experts.ffn_size}")


def check_rollout(config: Config, shape: ModelShape) -> None:
    """The engines of a policy that learns from its own responses. Raises ValueError."""
    check_engines(config, shape)
    limit = config.vllm_max_model_len or shape.max_length
    if limit and config.max_length and config.max_length >= limit:
        raise ValueError(
            f"a prompt of max_length {config.max_length} leaves an engine no room to answer: it holds {limit} tokens; lower "
            "max_length or raise vllm_max_model_len"
        )
    if limit and config.max_completion_length >= limit:
        name = "the model's limit" if limit == shape.max_length else "vllm_max_model_len"
        given = f"max_completion_length {config.max_completion_length}"
        raise ValueError(f"{given} leaves no room for a prompt: {name} is {limit} tokens")
    ranks, engines, width = policy_ranks(config), rollout_engines(config), config.vllm_tensor_parallel_size
    if config.vllm_mode == "colocate" and config.nnodes > 1 and config.nproc_per_node % width:
        raise ValueError(
            f"vllm_tensor_parallel_size {width} does not divide nproc_per_node {config.nproc_per_node}: an engine's devices are "
            "those of policy ranks of one node"
        )
    if config.vllm_mode == "colocate":
        _check_places(ranks, engines, width, config.rollout.engines_per_device)


def _check_places(ranks: int, engines: int, width: int, each: int) -> None:
    """Whether engines on `width` devices each, and `each` on a device, find room on the policy's ranks. Raises ValueError."""
    if each > 1 and width > 1:
        raise ValueError(
            f"rollout.engines_per_device {each} is for a model too small to keep a GPU busy, vllm_tensor_parallel_size {width} "
            "for one too large for it: leave one of them out"
        )
    if engines % each:
        raise ValueError(
            f"rollout.num_engines {engines} is no multiple of rollout.engines_per_device {each}: leave num_engines out, or give "
            f"{-(-engines // each) * each}"
        )
    if engines == 0 or engines // each * width > ranks:
        shown = f"{max(engines, 1)} engines" + (f", {each} on a device," if each > 1 else f" x vllm_tensor_parallel_size {width}")
        needed = max(engines // each, 1) * width
        raise ValueError(f"vllm_mode colocate has {ranks} policy ranks to share; {shown} need {needed}")
