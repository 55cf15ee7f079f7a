"""What a GPU holds while policy, frozen models and engines take turns on it: a prediction made of `rlhf.memory`'s sizes.

A step has three phases: "train" (logprobs and updates; the engine sleeps), "push" (weights of policy and engine side by side, no
gradients, no KV cache) and "generate" (the engine has its share of the GPU, the policy what it does not offload). A teacher that
is on the GPU for its logits alone, or on GPUs of its own, has a fourth, "teacher".
"""

from __future__ import annotations

from rlhf.config import Config
from rlhf.counts import frozen_group, policy_ranks, samples, teacher_places
from rlhf.memory import (
    BYTES,
    GIB,
    engine_memory,
    frozen_memory,
    micro_batch_tokens,
    optimizer_bytes,
    optimizer_state_bytes,
    policy_memory,
    recorded_logprobs,
    reward_model_memory,
)
from rlhf.model_folder import ModelShape
from rlhf.records import BUCKET_BYTES

ACTIVATIONS = "activations of"
# Measured on an H200, with a Qwen2.5 of 1.5B and 7B parameters.
RANK_CONTEXT = 3 * GIB  # of a Megatron rank after its first step: CUDA context, kernels, NCCL's buffers, workspaces
ENGINE_RESIDUE = 3 * GIB // 2  # of an engine, also asleep, beside its share: CUDA context, kernels, CUDA graphs
ENGINE_WORK = 2 * GIB  # of an engine awake: the largest forward pass and sampling that vLLM profiles
WORKER_CONTEXT = GIB // 2  # not measured: of an engine's other workers, each, on its first GPU, where they read what is pushed
OFFLOADED_STATE = 16  # bytes of host memory for a parameter: its weight, gradient and moments in float32
PUSH_BUCKETS = 3  # of one push: packed, on its way, being loaded


def phases(config: Config, shape: ModelShape, frozen_shape: ModelShape | None, gpu_memory: int) -> dict[str, int]:
    """Predicted peak of each phase on the fullest GPU, in bytes: of a config that `rlhf.fit` has completed."""
    return {phase: sum(held.values()) for phase, held in holdings(config, shape, frozen_shape, gpu_memory).items()}


def holdings(config: Config, shape: ModelShape, frozen_shape: ModelShape | None, gpu_memory: int) -> dict[str, dict[str, int]]:
    """{phase: {what: bytes}} on the fullest GPU: that of a policy rank, a frozen rank and an engine, where they share one.

    In server mode the fullest GPU of "generate" is an engine's, of the other phases the policy's. Without engines
    there is "train" alone, and "teacher" with `offload_teacher_model`. A teacher's own GPUs have that phase alone.
    """
    doing = f"{ACTIVATIONS} {micro_batch_tokens(config):,} tokens"
    if frozen_shape and teacher_places(config):
        teacher = frozen_memory(config, frozen_shape)
        own = {"contexts": RANK_CONTEXT, "teacher weights": teacher.weights, doing: teacher.activations}
        return holdings(config, shape, None, gpu_memory) | {"teacher": own}
    policy = policy_memory(config, shape)
    beside = {f"{frozen_group(config)} weights": frozen_memory(config, frozen_shape) if frozen_shape else None}
    beside["reward model weights"] = reward_model_memory(config)
    frozen = {name: memory for name, memory in beside.items() if memory is not None}
    ranks = {
        "contexts": RANK_CONTEXT * (1 + len(frozen)),
        "policy weights": policy.weights,
        "optimizer state": policy.optimizer,
    }
    gradients = {"gradients": policy.gradients}
    alone = {}  # what a teacher that does not stay has to itself
    if config.offload_teacher_model:
        ((name, teacher),) = frozen.items()
        alone["teacher"] = ranks | gradients | {name: teacher.weights, doing: teacher.activations}
        frozen = {}
    ranks |= {name: memory.weights for name, memory in frozen.items()}
    train = ranks | gradients | {doing: max(memory.activations for memory in (policy, *frozen.values()))}
    if not samples(config):
        return {"train": train} | alone
    widest = max(shape.vocab_size, shape.ffn_size, shape.experts.ffn_size if shape.experts else 0)
    largest = widest * shape.hidden_size * BYTES[config.torch_dtype]
    buffers = {"push buffers": PUSH_BUCKETS * max(BUCKET_BYTES, largest)}
    others = (config.vllm_tensor_parallel_size - 1) * WORKER_CONTEXT
    engines = config.rollout.engines_per_device
    contexts = engines * (ENGINE_RESIDUE + recorded_logprobs(config)) + others
    asleep = {"sleeping engine": contexts}
    engine = {"engine": int(config.vllm_gpu_memory_utilization * gpu_memory), "engine's contexts": contexts}
    if not shares_gpus(config):  # a rank keeps what training took; engines are pushed to while they are awake
        pushing = max(train, ranks | gradients | buffers, key=lambda held: sum(held.values()))
        return {"train": train} | alone | {"push": pushing, "generate": engine | buffers}
    optimizer = {"optimizer state"} if config.offload_optimizer else set()
    frozen_away = set(frozen) if config.offload_model else set()
    policy_away = {"policy weights"} if config.offload_model else set()
    loaded = {"engine weights": engines * engine_memory(config, shape).weights}
    return {phase: held | asleep for phase, held in ({"train": train} | alone).items()} | {
        "push": _without(ranks, optimizer | frozen_away) | asleep | loaded | buffers,
        "generate": _without(ranks, optimizer | frozen_away | policy_away) | engine,
    }


def offloaded(config: Config, shape: ModelShape, frozen_shape: ModelShape | None) -> int:
    """Bytes of one node's host memory that what is offloaded takes, of a completed config.

    What optimizer_cpu_offload keeps there has its weight and gradient there too, in float32.
    """
    policy, ranks = policy_memory(config, shape), policy_ranks(config) // config.nnodes
    size = policy.optimizer * bool(config.offload_optimizer) + policy.weights * bool(config.offload_model)
    if config.optimizer_cpu_offload:
        there = optimizer_bytes(config, shape) - policy.optimizer
        size += there // optimizer_state_bytes(config) * OFFLOADED_STATE
    if frozen_shape and not teacher_places(config) and (config.offload_model or config.offload_teacher_model):
        size += frozen_memory(config, frozen_shape).weights
    if config.reward_model is not None and config.offload_model:
        size += reward_model_memory(config).weights
    return ranks * size


def shares_gpus(config: Config) -> bool:
    """Whether the engines of a run on GPUs use the policy's by turns."""
    return samples(config) and config.vllm_mode == "colocate"


def _without(held: dict[str, int], names: set[str]) -> dict[str, int]:
    return {name: size for name, size in held.items() if name not in names}
