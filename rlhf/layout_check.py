"""Whether models can be split over the ranks they get: the policy, a frozen reference or teacher, a reward model."""

from __future__ import annotations

from pathlib import Path

from rlhf.config import Config
from rlhf.counts import compares, frozen_group, frozen_ranks, model_ranks, policy_ranks, teacher_engines, teacher_places
from rlhf.expert_checks import check_expert_sizes, check_experts
from rlhf.model_folder import ModelShape, read_shape
from rlhf.pipeline import Pipeline, frozen_pipeline, policy_pipeline


def check_policy_layout(config: Config, shape: ModelShape) -> None:
    """The policy of a resolved config. Raises ValueError."""
    check_layout(shape, config.tensor_model_parallel_size, policy_pipeline(config))
    check_experts(config, shape)
    ranks, each = policy_ranks(config), model_ranks(config)
    if ranks % each:
        raise ValueError(
            f"{config.nnodes} nodes x {config.nproc_per_node} ranks = {ranks} policy ranks is no multiple of "
            f"tensor_model_parallel_size {config.tensor_model_parallel_size} x pipeline_model_parallel_size "
            f"{config.pipeline_model_parallel_size} = {each}: set --nproc_per_node (or NPROC_PER_NODE)"
        )


def check_layout(shape: ModelShape, tensor_size: int, pipeline: Pipeline, prefix: str = "") -> None:
    """Whether a model can be split that way. Raises ValueError."""
    check_tensor_split(shape, tensor_size, f"{prefix}tensor_model_parallel_size {tensor_size}")
    try:
        pipeline.stages(shape.num_layers)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def check_tensor_split(shape: ModelShape, size: int, name: str) -> None:
    """Whether each layer can be split over `size` devices, but for its experts; `name`: the option. Raises ValueError."""
    if shape.num_heads % size:
        raise ValueError(f"{name} does not divide the model's {shape.num_heads} attention heads")
    if shape.num_kv_heads % size and size % shape.num_kv_heads:
        raise ValueError(f"{name} neither divides nor is a multiple of the model's {shape.num_kv_heads} key-value heads")
    if shape.ffn_size % size:
        kind = "shared_expert_intermediate_size" if shape.experts else "intermediate_size"
        raise ValueError(f"{name} does not divide the model's {kind} {shape.ffn_size}")


def check_frozen(config: Config, name: str) -> None:
    """The role `name`, reference or teacher, which shares the policy's places or has its own. Raises ValueError."""
    role = getattr(config, name)
    if name == "teacher" and teacher_engines(config):  # see rlhf.distillation_check
        return
    given = [option for option, value in vars(role).items() if value is not None]
    if frozen_group(config) != name:
        idle = given if name == "reference" else given[1:]  # that the teacher is the policy itself, its model says
        if idle:
            lora = f"with LoRA the policy itself is the {name}, its adapter disabled"
            why = lora if config.task == "gkd" or compares(config) else "the loss compares with no reference"
            raise ValueError(f"--{name}.{idle[0]} has nothing to act on: {why}")
        return
    if not given:
        return
    folder = Path(role.model).expanduser() if role.model else Path(config.model)
    tensor = role.tensor_model_parallel_size or config.tensor_model_parallel_size
    pipeline = role.pipeline_model_parallel_size or config.pipeline_model_parallel_size
    shape = read_shape(folder)
    check_layout(shape, tensor, frozen_pipeline(config, role), f"{name}.")
    ranks = frozen_ranks(config)
    if ranks > policy_ranks(config) and not teacher_places(config):
        own = "; give it its own by --teacher.own_devices true" if name == "teacher" else ""
        have = f"the {policy_ranks(config)} policy ranks whose places it shares"
        raise ValueError(f"{name}.nproc {ranks} is more than {have}{own}")
    if ranks % (tensor * pipeline):
        raise ValueError(f"{name}: {ranks} ranks is no multiple of its TP {tensor} x PP {pipeline} = {tensor * pipeline}")
    check_expert_sizes(config, shape, tensor=tensor, pipeline=pipeline, ranks=ranks, prefix=f"{name}: ")


def check_reward_layout(config: Config, shape: ModelShape) -> None:
    """The reward model, which is split as the policy is. Raises ValueError."""
    tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    check_layout(shape, tensor, Pipeline(size=pipeline), "reward_model: ")
    check_expert_sizes(config, shape, tensor=tensor, pipeline=pipeline, ranks=policy_ranks(config), prefix="reward_model: ")
