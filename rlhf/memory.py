"""What a rank and an engine hold, in bytes: an estimate made from config.json alone.

Weights, gradients, optimizer state and KV cache are counted; activations are estimated from the tensors that the
backward pass keeps in Megatron's Transformer Engine layers. `rlhf.phases` adds up what shares a GPU, and each process's context.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from rlhf.config import Config, reads_prompts
from rlhf.counts import (
    data_ranks,
    engine_share,
    expert_copies,
    frozen_group,
    most_at_a_time,
    row_sequences,
    samples,
    teacher_width,
)
from rlhf.heads import head_of
from rlhf.model_folder import ModelShape, read_shape
from rlhf.pipeline import Pipeline, frozen_pipeline, policy_pipeline

GIB = 2**30
MLP_VALUES = 3  # numbers kept for each of its inner features, fused: both halves of the first layer, and their product
BYTES = {"float32": 4, "bfloat16": 2}
DIVERGENCE = 256 * 5 * 4  # bytes a column of the logits: a divergence is made of 256 tokens at a time, in some 5 float32 tensors


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
    held = _parameters(config, shape, config.tensor_model_parallel_size, policy_pipeline(config))
    frozen = sum(held) if config.tuner_type == "lora" else 0
    return Memory(
        weights=(frozen + trained + trained_experts) * size,
        gradients=(trained + trained_experts) * 4,
        optimizer=state - on_host,
        activations=activation_bytes(config, shape),
    )


def optimizer_bytes(config: Config, shape: ModelShape) -> int:
    """The optimizer's state of the fullest rank, wherever it is kept; split over the copies of what it is of."""
    each = optimizer_state_bytes(config)
    trained, trained_experts = _trained_parameters(config, shape)
    if not config.use_distributed_optimizer:
        return (trained + trained_experts) * each
    return trained * each // data_ranks(config) + trained_experts * each // expert_copies(config)


def optimizer_state_bytes(config: Config) -> int:
    """Of one trained parameter: two moments, and a master weight where the weights are bfloat16."""
    return 8 if BYTES[config.torch_dtype] == 4 else 12


def _parameters(config: Config, shape: ModelShape, tensor_size: int, pipeline: Pipeline) -> tuple[int, int]:
    """Of the fullest rank: all but its experts, and its experts."""
    stages = pipeline.stages(shape.num_layers)
    experts = shape.expert_parameters(config.expert_model_parallel_size, config.expert_tensor_parallel_size)
    held = zip(shape.stage_parameters(stages, tensor_size), (layers * experts for layers in stages))
    return max(held, key=sum)


def _trained_parameters(config: Config, shape: ModelShape) -> tuple[int, int]:
    """As `_parameters` of the policy, those that have gradients."""
    tensor, pipeline = config.tensor_model_parallel_size, policy_pipeline(config)
    if config.tuner_type == "full":
        return _parameters(config, shape, tensor, pipeline)
    rank, modules = config.lora_rank, config.target_modules
    stages, layer = pipeline.stages(shape.num_layers), shape.lora_parameters(rank, modules, tensor)
    experts = shape.expert_lora_parameters(rank, modules, config.expert_model_parallel_size)
    held = [layers * layer for layers in stages]
    held[0] += shape.embedding_parameters(tensor) * ("word_embeddings" in config.modules_to_save)
    held[-1] += shape.embedding_parameters(tensor) * ("output_layer" in config.modules_to_save)
    return max(zip(held, (layers * experts for layers in stages)), key=sum)


def frozen_memory(config: Config, shape: ModelShape) -> Memory:
    """A rank of the frozen reference or teacher; `shape`: of its own model."""
    role = getattr(config, frozen_group(config))
    tensor = role.tensor_model_parallel_size or config.tensor_model_parallel_size
    tokens, size = micro_batch_tokens(config), BYTES[config.torch_dtype]
    logits = _columns(shape, tensor) * (size + 4 if size < 4 else 4)  # and their float32 copy
    return Memory(
        weights=sum(_parameters(config, shape, tensor, frozen_pipeline(config, role))) * size,
        activations=tokens * max(_layer_values(shape, tensor, split=False) * size, logits),
    )


def teacher_engine_memory(config: Config) -> Memory:
    """One device of a vLLM engine that gives a teacher's logits."""
    shape = read_shape(Path(config.teacher.model))
    return Memory(weights=shape.num_parameters() // teacher_width(config) * BYTES[config.torch_dtype])


def reward_model_memory(config: Config) -> Memory | None:
    """A rank of the frozen reward model, on the policy's layout; None without one."""
    if config.reward_model is None:
        return None
    shape = _without_output(read_shape(Path(config.reward_model)))
    tensor, size = config.tensor_model_parallel_size, BYTES[config.torch_dtype]
    return Memory(
        weights=sum(_parameters(config, shape, tensor, Pipeline(size=config.pipeline_model_parallel_size))) * size,
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


def recorded_logprobs(config: Config) -> int:
    """Bytes on each device of an engine for the logprobs that it records: one in float32 for each place of a sequence."""
    return 4 * most_at_a_time(config) * (longest_sequence(config) + 1)


def responses_at_a_time(config: Config) -> int:
    """Responses of a batch that one engine decodes together, when the prompts are spread evenly."""
    return min(engine_share(config), most_at_a_time(config))


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
    stage holds up to PP micro batches, each further one a micro batch less; the last one has at the loss its logits
    (`_loss_bytes`). What is recomputed exists after the logits are gone. Gradients of one layer's activations are not counted.
    """
    size, stages = BYTES[config.torch_dtype], policy_pipeline(config).stages(shape.num_layers)
    values = [_stage_values(config, shape, layers) for layers in stages]
    at_a_time = [min(len(stages) - place, _micro_batches(config)) for place in range(len(stages))]
    most = max((count * kept + again) * size for count, (kept, again) in zip(at_a_time, values))
    at_loss = values[-1][0] * size + _outputs(config, shape) * _loss_bytes(config)
    columns = _columns(shape, config.tensor_model_parallel_size)
    divergence = DIVERGENCE * columns if config.task == "gkd" and not config.gkd_logits_topk else 0
    return micro_batch_tokens(config) * max(most, at_loss) + divergence


def _stage_values(config: Config, shape: ModelShape, layers: int) -> tuple[int, int]:
    """Numbers a token that a stage of so many layers keeps until the backward pass, and that it computes again in it."""
    tensor = config.tensor_model_parallel_size
    whole = _layer_values(shape, tensor, split=config.sequence_parallel)
    entry = shape.hidden_size // (tensor if config.sequence_parallel else 1)
    unit = min(config.recompute_num_layers or 1, layers)
    if config.recompute_granularity == "full" and config.recompute_method == "uniform":
        return -(-layers // unit) * entry, unit * whole
    if config.recompute_granularity == "full":
        return unit * entry + (layers - unit) * whole, whole
    if config.recompute_granularity == "selective" and {"mlp", "moe"} & set(config.recompute_modules):
        again = entry + _mlp_values(shape, tensor)
        return layers * (whole - again), again
    return layers * whole, 0


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
