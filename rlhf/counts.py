"""How many: ranks, copies of the policy, engines, optimizer steps of a resolved config."""

from __future__ import annotations

from math import ceil, lcm
from pathlib import Path

from rlhf.config import ALL, PAIRED, RERANKERS, Config
from rlhf.variables import variable

AT_A_TIME = (256, 1024)  # responses of an engine, at least for what is no batch: a dataset, or other jobs' prompts


def policy_ranks(config: Config) -> int:
    """Megatron ranks of the run: nnodes x nproc_per_node of a resolved config; 0 when there are engines alone."""
    if config.task not in (*ALL, "export"):
        return 0
    assert config.nproc_per_node is not None, "resolve the config first"
    return config.nnodes * config.nproc_per_node


def model_ranks(config: Config) -> int:
    """Ranks that hold one copy of the policy: TP x PP."""
    return config.tensor_model_parallel_size * config.pipeline_model_parallel_size


def least_ranks(config: Config) -> int:
    """The fewest ranks that the policy can be split over as it is: one copy, whose experts are split too."""
    experts = config.expert_model_parallel_size * config.expert_tensor_parallel_size
    return lcm(config.tensor_model_parallel_size, experts) * config.pipeline_model_parallel_size


def data_ranks(config: Config) -> int:
    """DP: copies of the policy."""
    return policy_ranks(config) // model_ranks(config)


def expert_copies(config: Config) -> int:
    """Copies of each expert of the policy: ranks that hold the same ones."""
    each = config.expert_model_parallel_size * config.expert_tensor_parallel_size * config.pipeline_model_parallel_size
    return policy_ranks(config) // each


def samples(config: Config) -> bool:
    """Whether the policy's own responses are trained on: the policy has rollout engines."""
    return config.task == "grpo" or config.task == "gkd" and config.lmbda > 0


def rollout_engines(config: Config) -> int:
    """vLLM engines of the run; 0 when the task generates nothing."""
    if config.task == "export" or config.task in ALL and not samples(config):
        return 0
    if config.rollout.num_engines is not None:
        return config.rollout.num_engines
    if config.vllm_mode != "colocate":
        return 1
    return policy_ranks(config) // config.vllm_tensor_parallel_size * config.rollout.engines_per_device


def most_at_a_time(config: Config) -> int:
    """Responses that one engine decodes together at most: `vllm_max_num_seqs`, by default its share within AT_A_TIME."""
    least, most = AT_A_TIME
    return config.vllm_max_num_seqs or min(max(engine_share(config), least), most)


def engine_share(config: Config) -> int:
    """Responses of a generation batch to one engine, when they are spread evenly; all of them to a teacher's."""
    return -(-(config.generation_batch_size or config.global_batch_size) // max(rollout_engines(config), 1))


def compares(config: Config) -> bool:
    """Whether the loss compares the policy with a reference."""
    if config.task == "grpo":
        return bool(config.beta)
    return config.task == "kto" or config.task == "dpo" and not config.reference_free and config.loss_type != "sft"


def own_places(config: Config) -> bool:
    """Whether engines have places (GPUs, or cores) of their own, instead of the policy's."""
    return config.task not in ALL or samples(config) and config.vllm_mode == "server"


def needs_reference(config: Config) -> bool:
    """Whether a frozen reference group runs beside the policy (with LoRA the policy serves, its adapter disabled)."""
    return compares(config) and config.tuner_type == "full"


def needs_teacher(config: Config) -> bool:
    """Whether a frozen teacher group runs beside the policy (with LoRA the policy is its own teacher, its adapter disabled)."""
    own = config.mcore_model or config.model
    itself = config.tuner_type == "lora" and config.teacher.model == own
    return config.task == "gkd" and not teacher_engines(config) and not itself


def teacher_engines(config: Config) -> int:
    """vLLM engines that give a teacher's logits, on places of their own."""
    if config.task != "gkd" or config.teacher.backend != "vllm":
        return 0
    width = teacher_width(config)
    return (config.teacher.nproc or width) // width


def teacher_width(config: Config) -> int:
    """Devices of one copy of a teacher's layers: its TP size."""
    return config.teacher.tensor_model_parallel_size or config.tensor_model_parallel_size


def teacher_devices(config: Config) -> int:
    """Devices of one copy of a teacher: TP x PP of Megatron ranks, an engine's TP."""
    stages = config.teacher.pipeline_model_parallel_size or config.pipeline_model_parallel_size
    return teacher_width(config) * (1 if teacher_engines(config) else stages)


def teacher_places(config: Config) -> list[int]:
    """Devices of each place that a teacher has to itself, an engine's or a rank's; none where it shares the policy's."""
    if engines := teacher_engines(config):
        return [teacher_width(config)] * engines
    if needs_teacher(config) and config.teacher.own_devices:
        return [1] * (config.teacher.nproc or teacher_devices(config))
    return []


def frozen_ranks(config: Config) -> int:
    """Ranks of the frozen group, which there is."""
    return len(teacher_places(config)) or getattr(config, frozen_group(config)).nproc or policy_ranks(config)


def frozen_group(config: Config) -> str | None:
    """The role of the frozen group that runs beside the policy, which is a section of the config too; None without one."""
    return "reference" if needs_reference(config) else "teacher" if needs_teacher(config) else None


def reward_names(config: Config) -> list[str]:
    """The rewards in the order of `reward_weights`: functions, then the reward model by its folder's name, or its run's."""
    if not config.reward_model:
        return list(config.reward_funcs)
    folder = Path(config.reward_model)
    run = folder.parent.name if folder.name.startswith("checkpoint-") else ""
    return [*config.reward_funcs, run or folder.name]


def row_sequences(config: Config) -> int:
    """Sequences of a row that are read in one micro batch; of an infonce row the least, an anchor and its positive."""
    if config.task in PAIRED:
        return 2
    if config.task == "embedding":
        return 2 + ((variable(config, "INFONCE_HARD_NEGATIVES") or 0) if config.loss_type == "infonce" else 0)
    if config.task in RERANKERS:
        return variable(config, "MAX_POSITIVE_SAMPLES") * (1 + variable(config, "MAX_NEGATIVE_SAMPLES"))
    return 1


def updates(config: Config) -> int:
    """Optimizer steps that share a generation batch; 1 for a task without any."""
    return config.steps_per_generation * config.num_iterations if config.task == "grpo" else 1


def total_steps(config: Config, num_rows: int) -> int:
    """Optimizer steps of the run: num_train_epochs over the dataset's `num_rows`, else train_iters."""
    if config.num_train_epochs is None:
        return config.train_iters
    if config.task != "grpo":
        return ceil(config.num_train_epochs * num_rows / config.global_batch_size)
    prompts = config.generation_batch_size // config.num_generations
    return ceil(config.num_train_epochs * num_rows / prompts) * updates(config)
