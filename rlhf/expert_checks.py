"""What can be wrong with options of mixture-of-experts models, and what can be said of them."""

from __future__ import annotations

from dataclasses import fields

from rlhf.config import Config, ExpertOptions
from rlhf.counts import policy_ranks
from rlhf.model_folder import ModelShape


def check_experts(config: Config, shape: ModelShape) -> None:
    """The policy's expert sizes and options. Raises ValueError."""
    if shape.experts is None:
        _refuse_without_experts(config, shape)
        return
    tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    if tensor > 1 and not config.sequence_parallel:
        raise ValueError(f"tensor_model_parallel_size {tensor} of a model with experts needs --sequence_parallel true")
    check_expert_sizes(config, shape, tensor=tensor, pipeline=pipeline, ranks=policy_ranks(config))
    if config.tuner_type == "lora" and config.expert_tensor_parallel_size > 1:
        raise ValueError(
            f"expert_tensor_parallel_size {config.expert_tensor_parallel_size}: adapters of experts cannot be split; "
            "raise expert_model_parallel_size instead"
        )
    if config.moe_pad_expert_input_to_capacity and config.moe_expert_capacity_factor is None:
        raise ValueError("moe_pad_expert_input_to_capacity needs --moe_expert_capacity_factor")
    if config.moe_pad_expert_input_to_capacity and config.expert_model_parallel_size > 1:
        raise ValueError(
            "moe_pad_expert_input_to_capacity needs micro batches of equal length on the ranks that share experts, and rows are "
            "never padded here: leave it out, or set expert_model_parallel_size to 1"
        )
    if config.moe_token_drop_policy != "probs" and config.moe_expert_capacity_factor is None:
        raise ValueError(f"moe_token_drop_policy {config.moe_token_drop_policy} needs --moe_expert_capacity_factor")


def check_expert_sizes(config: Config, shape: ModelShape, *, tensor: int, pipeline: int, ranks: int, prefix: str = "") -> None:
    """Whether experts can be split over the ranks of the policy, or of another role that `prefix` names. Raises ValueError."""
    if shape.experts is None:
        return
    size, tensor_size = config.expert_model_parallel_size, config.expert_tensor_parallel_size
    if shape.experts.count % size:
        raise ValueError(f"{prefix}expert_model_parallel_size {size} does not divide the model's {shape.experts.count} experts")
    if shape.experts.ffn_size % tensor_size:
        raise ValueError(
            f"{prefix}expert_tensor_parallel_size {tensor_size} does not divide the model's moe_intermediate_size "
            f"{shape.experts.ffn_size}"
        )
    if size == 1 and tensor_size != tensor:  # Megatron then takes experts for a part of every data rank
        raise ValueError(
            f"{prefix}with expert_model_parallel_size 1 every tensor rank needs its part of each expert, and Megatron would not "
            f"add up gradients otherwise: give --expert_tensor_parallel_size {tensor}, or a greater expert_model_parallel_size"
        )
    if ranks % (size * tensor_size * pipeline):
        raise ValueError(
            f"{prefix}{ranks} ranks is no multiple of expert_model_parallel_size {size} x expert_tensor_parallel_size "
            f"{tensor_size} x pipeline_model_parallel_size {pipeline} = {size * tensor_size * pipeline}"
        )


def expert_notes(config: Config, shape: ModelShape) -> list[str]:
    """What the user of a model with experts should know."""
    if shape.experts and config.moe_shared_expert_overlap and not shape.ffn_size:
        return ["moe_shared_expert_overlap has no effect: the model has no shared expert"]
    return []


def _refuse_without_experts(config: Config, shape: ModelShape) -> None:
    names = ["expert_model_parallel_size", "expert_tensor_parallel_size", *(item.name for item in fields(ExpertOptions))]
    for name in names:
        value = getattr(config, name)
        if value != getattr(Config, name):
            shown = str(value).lower() if isinstance(value, bool) else value
            raise ValueError(f"{name} {shown} has nothing to act on: {shape.model_type} is no mixture-of-experts model")
