"""What a rank, an engine and a shared GPU hold, in bytes: an estimate made from config.json alone.

Weights, gradients, optimizer state and KV cache are counted; activations are estimated from the tensors that the
backward pass keeps in Megatron's Transformer Engine layers. A process of its own has a context besides: constants below.

On GPUs policy, reference and engine take turns. A step has three phases: "train" (logprobs and updates; the engine sleeps),
"push" (weights of policy and engine side by side, no gradients, no KV cache) and "generate" (the engine has its share of the
GPU, the policy what it does not offload). A teacher that is on the GPU for its logits alone has a fourth, "teacher".
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from rlhf.config import Config, reads_prompts
from rlhf.counts import data_ranks, expert_copies, frozen_group, policy_ranks, rollout_engines, row_sequences, samples
from rlhf.heads import head_of
from rlhf.model_folder import ModelShape, read_shape

GIB = 2**30
MLP_VALUES = 3  # numbers kept for each of its inner features, fused: both halves of the first layer, and their product
ACTIVATIONS = "activations of"
BYTES = {"float32": 4, "bfloat16": 2}
# Measured on an H200, with a Qwen2.5 of 1.5B and 7B parameters.
RANK_CONTEXT = 5 * GIB // 2  # of a Megatron rank: CUDA context, kernels, NCCL's buffers, workspaces
ENGINE_RESIDUE = 3 * GIB // 2  # of an engine, also asleep: CUDA context, kernels, CUDA graphs
ENGINE_WORK = 2 * GIB  # of an engine awake: the largest forward pass and sampling that vLLM profiles
OFFLOADED_STATE = 16  # bytes of host memory for a parameter: its weight, gradient and moments in float32
PUSH_BUCKETS = 3  # of one push: packed, on its way, being loaded
DIVERGENCE = 256 * 5 * 4  # bytes a column of the logits: a divergence is made of 256 tokens at a time, in some 5 float32 tensors
BUCKET = 256 * 2**20  # its size, or that of a larger tensor


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    kv_cache: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, item.name) for item in fields(self))


def policy_memory(config: Config, shape: ModelShape) -> Memory:
    """The fullest policy rank: float32 gradients and moments, and a float32 copy of bfloat16 weights."""
    size, (trained, trained_experts) = BYTES[config.torch_dtype], _trained_parameters(config, shape)
    state = optimizer_bytes(config, shape)
    on_host = int(config.optimizer_offload_fraction * state) if config.optimizer_cpu_offload else 0
    frozen = sum(_parameters(config, shape)) if config.tuner_type == "lora" else 0
    return Memory(
        weights=(frozen + trained + trained_experts) * size,
        gradients=(trained + trained_experts) * 4,
        optimizer=state - on_host,
        activations=activation_bytes(config, shape),
    )


def optimizer_bytes(config: Config, shape: ModelShape) -> int:
    """The optimizer's state of the fullest rank, wherever it is kept; split over the copies of what it is of."""
    each = _state_bytes(config)
    trained, trained_experts = _trained_parameters(config, shape)
    if not config.use_distributed_optimizer:
        return (trained + trained_experts) * each
    return trained * each // data_ranks(config) + trained_experts * each // expert_copies(config)


def _state_bytes(config: Config) -> int:
    """Of one trained parameter: two moments, and a master weight where the weights are bfloat16."""
    return 8 if BYTES[config.torch_dtype] == 4 else 12


def _parameters(config: Config, shape: ModelShape) -> tuple[int, int]:
    """Of the fullest rank: all but its experts, and its experts."""
    pipeline = config.pipeline_model_parallel_size
    experts = shape.expert_parameters(config.expert_model_parallel_size, config.expert_tensor_parallel_size)
    return shape.rank_parameters(config.tensor_model_parallel_size, pipeline), shape.num_layers // pipeline * experts


def _trained_parameters(config: Config, shape: ModelShape) -> tuple[int, int]:
    """As `_parameters`, those that have gradients."""
    if config.tuner_type == "full":
        return _parameters(config, shape)
    tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    rank, modules = config.lora_rank, config.target_modules
    experts = shape.expert_lora_parameters(rank, modules, config.expert_model_parallel_size)
    matrices = len(config.modules_to_save) if pipeline == 1 else min(len(config.modules_to_save), 1)
    whole = matrices * shape.embedding_parameters(tensor)
    return shape.lora_parameters(rank, modules, tensor, pipeline) + whole, shape.num_layers // pipeline * experts


def frozen_memory(config: Config, shape: ModelShape) -> Memory:
    """A rank of the frozen reference or teacher; `shape`: of its own model."""
    role = getattr(config, frozen_group(config))
    tensor = role.tensor_model_parallel_size or config.tensor_model_parallel_size
    pipeline = role.pipeline_model_parallel_size or config.pipeline_model_parallel_size
    experts = shape.expert_parameters(config.expert_model_parallel_size, config.expert_tensor_parallel_size)
    tokens, size = micro_batch_tokens(config), BYTES[config.torch_dtype]
    logits = _columns(shape, tensor) * (size + 4 if size < 4 else 4)  # and their float32 copy
    return Memory(
        weights=(shape.rank_parameters(tensor, pipeline) + shape.num_layers // pipeline * experts) * size,
        activations=tokens * max(_layer_values(shape, tensor, split=False) * size, logits),
    )


def reward_model_memory(config: Config) -> Memory | None:
    """A rank of the frozen reward model, on the policy's layout; None without one."""
    if config.reward_model is None:
        return None
    shape = _without_output(read_shape(Path(config.reward_model)))
    tensor, size = config.tensor_model_parallel_size, BYTES[config.torch_dtype]
    return Memory(
        weights=sum(_parameters(config, shape)) * size,
        activations=micro_batch_tokens(config) * _layer_values(shape, tensor, split=False) * size,
    )


def engine_memory(config: Config, shape: ModelShape) -> Memory:
    """One device of a vLLM engine; its KV cache holds all responses that it decodes at a time, each at its longest."""
    return Memory(
        weights=shape.num_parameters() // config.vllm_tensor_parallel_size * BYTES[config.torch_dtype],
        kv_cache=responses_at_a_time(config) * sequence_cache(config, shape),
    )


def sequence_cache(config: Config, shape: ModelShape) -> int:
    """Bytes of KV cache that the longest sequence takes on one device of an engine."""
    kv_heads = max(shape.num_kv_heads // config.vllm_tensor_parallel_size, 1)
    per_token = 2 * shape.num_layers * kv_heads * shape.head_dim * BYTES[config.torch_dtype]
    return longest_sequence(config) * per_token


def responses_at_a_time(config: Config) -> int:
    """Responses that one engine decodes together, when the prompts are spread evenly."""
    share = -(-(config.generation_batch_size or config.global_batch_size) // rollout_engines(config))
    return min(share, config.vllm_max_num_seqs or share)


def longest_sequence(config: Config) -> int:
    """Tokens of the longest row, or prompt with response."""
    if not reads_prompts(config):
        return config.max_length or 0
    return config.vllm_max_model_len or (config.max_length or 0) + config.max_completion_length


def micro_batch_tokens(config: Config) -> int:
    """Tokens of the fullest micro batch: a row (of a preference: the pair) longer than the budget, or a pack, is one alone."""
    longest = longest_sequence(config) * row_sequences(config)
    if config.packing:
        longest = max(config.packing_length, longest)
    return max(config.micro_batch_tokens, longest) if config.micro_batch_tokens else config.micro_batch_size * longest


def activation_bytes(config: Config, shape: ModelShape) -> int:
    """The most that a training step needs besides weights, gradients and optimizer state, on the fullest stage.

    Each layer keeps what `_layer_values` counts for the backward pass, or its input alone where it is recomputed. The first
    stage holds up to PP micro batches; the last one holds one, and at the loss its logits (`_loss_bytes`). What is recomputed
    exists after the logits are gone. The gradients of one layer's activations are not counted.
    """
    tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    size, layers = BYTES[config.torch_dtype], shape.num_layers // pipeline
    whole = _layer_values(shape, tensor, split=config.sequence_parallel)
    entry = shape.hidden_size // (tensor if config.sequence_parallel else 1)
    unit = config.recompute_num_layers or 1
    kept, again = layers * whole, 0  # numbers a token: until the backward pass; in it, recomputed
    if config.recompute_granularity == "full" and config.recompute_method == "uniform":
        kept, again = -(-layers // unit) * entry, unit * whole
    elif config.recompute_granularity == "full":
        kept, again = unit * entry + (layers - unit) * whole, whole
    elif config.recompute_granularity == "selective" and {"mlp", "moe"} & set(config.recompute_modules):
        again = entry + _mlp_values(shape, tensor)
        kept -= layers * again
    first = kept * size * min(pipeline, _micro_batches(config)) + again * size
    last = kept * size + _outputs(config, shape) * _loss_bytes(config)
    divergence = DIVERGENCE * _columns(shape, tensor) if config.task == "gkd" and not config.gkd_logits_topk else 0
    return micro_batch_tokens(config) * max(first, last) + divergence


def _micro_batches(config: Config) -> int:
    rows = -(-config.global_batch_size // data_ranks(config))
    return rows if config.micro_batch_tokens else -(-rows // config.micro_batch_size)


def _layer_values(shape: ModelShape, tensor_size: int, *, split: bool) -> int:
    """Numbers a token that one layer keeps.

    The two norms' inputs and outputs (`split` over TP under sequence parallelism); queries, keys and values as one tensor,
    queries and keys after rotation, the same again before their norm in a model that has one; the attention's output; and
    those of the MLP.
    """
    heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    norms = 4 * shape.hidden_size // (tensor_size if split else 1)
    queries_and_keys = (3 if shape.qk_norm else 2) * (heads + kv_heads)
    return norms + (queries_and_keys + kv_heads + heads) // tensor_size + _mlp_values(shape, tensor_size)


def _mlp_values(shape: ModelShape, tensor_size: int) -> int:
    """MLP_VALUES of each inner feature. A token's copies for its experts count too, on the way in and out of them.

    Tokens are taken to spread evenly over the experts' ranks; tensor ranks have their own part of them (sequence parallelism).
    """
    values = MLP_VALUES * shape.ffn_size
    if shape.experts:
        values += shape.experts.active * (2 * shape.hidden_size + MLP_VALUES * shape.experts.ffn_size)
    return values // tensor_size


def _loss_bytes(config: Config) -> int:
    """Bytes that torch reserves for each logit at the loss, measured on an H200 in bfloat16.

    The logits in bfloat16, then in float32, which become the softmax and its gradient, and the blocks that are free by then; the
    fused loss is compiled and does not write in place. gkd, not measured: the logits and those of trained tokens, the gradient
    of both, the teacher's (but for its top k); and another copy for the cross entropy of sampled tokens, or with `sft_alpha`.
    """
    cross_entropy = 14 if config.cross_entropy_loss_fusion else 11
    if config.task != "gkd":
        return cross_entropy
    copies = BYTES[config.torch_dtype] * (4 if config.gkd_logits_topk else 5)
    return copies + (cross_entropy if samples(config) or config.sft_alpha else 0)


def stored_logits(config: Config, shape: ModelShape) -> int:
    """Bytes that the teacher's logits for a trained token take in Ray's object store, until the step is done."""
    if config.gkd_logits_topk:
        return 8 * config.gkd_logits_topk  # ids int32, logits float32
    return shape.vocab_size * BYTES[config.torch_dtype]


def _outputs(config: Config, shape: ModelShape) -> int:
    """Numbers a token that the policy's last stage gives to the loss."""
    head = head_of(config)
    if head.is_language_model:
        return _columns(shape, config.tensor_model_parallel_size)
    return shape.hidden_size if head.kind == "embedding" else head.num_labels or 1


def _columns(shape: ModelShape, tensor_size: int) -> int:
    """Columns of the logits on one tensor rank."""
    return -(-shape.vocab_size // tensor_size)


def shares_gpus(config: Config) -> bool:
    """Whether the engines of a run on GPUs use the policy's by turns."""
    return samples(config) and config.vllm_mode == "colocate"


def shapes(config: Config) -> tuple[ModelShape, ModelShape | None]:
    """The policy's, and the frozen reference's or teacher's (None without one), of a config whose models are local folders."""
    shape, name = read_shape(Path(config.model)), frozen_group(config)
    if not head_of(config).has_output_matrix:
        shape = _without_output(shape)
    if name is None:
        return shape, None
    folder = getattr(config, name).model
    return shape, read_shape(Path(folder)) if folder else shape


def _without_output(shape: ModelShape) -> ModelShape:
    """Of a model without an output matrix; a head of scores is too small to count."""
    return replace(shape, tied_embeddings=True)


def phases(config: Config, shape: ModelShape, frozen_shape: ModelShape | None, gpu_memory: int) -> dict[str, int]:
    """Predicted peak of each phase on the fullest GPU, in bytes: of a config that `rlhf.fit` has completed."""
    return {phase: sum(held.values()) for phase, held in holdings(config, shape, frozen_shape, gpu_memory).items()}


def holdings(
    config: Config, shape: ModelShape, frozen_shape: ModelShape | None, gpu_memory: int
) -> dict[str, dict[str, int]]:
    """{phase: {what: bytes}} on the fullest GPU: that of a policy rank, a frozen rank and an engine, where they share one.

    In server mode the fullest GPU of "generate" is an engine's, of the other phases the policy's. Without engines
    there is "train" alone, and "teacher" with `offload_teacher_model`.
    """
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
    doing = f"{ACTIVATIONS} {micro_batch_tokens(config):,} tokens"
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
    buffers = {"push buffers": PUSH_BUCKETS * max(BUCKET, largest)}
    engine = {"engine": int(config.vllm_gpu_memory_utilization * gpu_memory)}
    if not shares_gpus(config):
        pushing = {"push": ranks | gradients | buffers, "generate": engine | buffers}  # pushed to while awake
        return {"train": train} | alone | pushing
    asleep = {"sleeping engine": ENGINE_RESIDUE}
    optimizer = {"optimizer state"} if config.offload_optimizer else set()
    frozen_away = set(frozen) if config.offload_model else set()
    policy_away = {"policy weights"} if config.offload_model else set()
    loaded = {"engine weights": engine_memory(config, shape).weights}
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
        size += there // _state_bytes(config) * OFFLOADED_STATE
    if frozen_shape and (config.offload_model or config.offload_teacher_model):
        size += frozen_memory(config, frozen_shape).weights
    if config.reward_model is not None and config.offload_model:
        size += reward_model_memory(config).weights
    return ranks * size


def _without(held: dict[str, int], names: set[str]) -> dict[str, int]:
    return {name: size for name, size in held.items() if name not in names}
