"""What a rank and an engine hold, in bytes: an estimate made from config.json alone.

Weights, gradients, optimizer state and KV cache are counted; activations are estimated from the tensors that the
backward pass keeps in Megatron's Transformer Engine layers. Libraries and fragmentation come on top.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from rlhf.config import Config
from rlhf.counts import data_ranks, rollout_engines
from rlhf.model_folder import ModelShape

BYTES = {"float32": 4, "bfloat16": 2}


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
    tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    size = BYTES[config.torch_dtype]
    frozen, trained = 0, shape.rank_parameters(tensor, pipeline)
    if config.tuner_type == "lora":
        frozen, trained = trained, shape.lora_parameters(config.lora_rank, config.target_modules, tensor, pipeline)
    state = trained * (8 if size == 4 else 12)
    return Memory(
        weights=(frozen + trained) * size,
        gradients=trained * 4,
        optimizer=state // data_ranks(config) if config.use_distributed_optimizer else state,
        activations=activation_bytes(config, shape),
    )


def reference_memory(config: Config, shape: ModelShape) -> Memory:
    """A rank of the frozen reference; `shape`: of its own model."""
    role = config.reference
    tensor = role.tensor_model_parallel_size or config.tensor_model_parallel_size
    pipeline = role.pipeline_model_parallel_size or config.pipeline_model_parallel_size
    tokens, size = micro_batch_tokens(config), BYTES[config.torch_dtype]
    return Memory(
        weights=shape.rank_parameters(tensor, pipeline) * size,
        activations=tokens * (_layer_values(shape, tensor, split=False) * size + _logit_bytes(shape, tensor, size)),
    )


def engine_memory(config: Config, shape: ModelShape) -> Memory:
    """One device of a vLLM engine; its KV cache holds all responses that it decodes at a time, each at its longest."""
    tensor, size = config.vllm_tensor_parallel_size, BYTES[config.torch_dtype]
    kv_heads = max(shape.num_kv_heads // tensor, 1)
    per_token = 2 * shape.num_layers * kv_heads * shape.head_dim * size
    return Memory(
        weights=shape.num_parameters() // tensor * size,
        kv_cache=responses_at_a_time(config) * longest_sequence(config) * per_token,
    )


def responses_at_a_time(config: Config) -> int:
    """Responses that one engine decodes together, when the prompts are spread evenly."""
    share = -(-config.generation_batch_size // rollout_engines(config))
    return min(share, config.vllm_max_num_seqs or share)


def longest_sequence(config: Config) -> int:
    """Tokens of the longest row, or prompt with response."""
    if config.task == "sft":
        return config.max_length or 0
    return config.vllm_max_model_len or (config.max_length or 0) + config.max_completion_length


def micro_batch_tokens(config: Config) -> int:
    """Tokens of the fullest micro batch: a sequence longer than the budget makes one alone."""
    longest = config.packing_length if config.packing else longest_sequence(config)
    return max(config.micro_batch_tokens, longest) if config.micro_batch_tokens else config.micro_batch_size * longest


def activation_bytes(config: Config, shape: ModelShape) -> int:
    """What the backward pass keeps on the fullest stage.

    The first stage holds up to PP micro batches, the last one micro batch and its logits.
    """
    tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    size, layers = BYTES[config.torch_dtype], shape.num_layers // pipeline
    whole = _layer_values(shape, tensor, split=config.sequence_parallel)
    entry = shape.hidden_size // (tensor if config.sequence_parallel else 1)
    unit = config.recompute_num_layers or 1
    if config.recompute_granularity != "full":
        kept = layers * whole
    elif config.recompute_method == "uniform":
        kept = -(-layers // unit) * entry + unit * whole
    else:
        kept = unit * entry + (layers - unit + 1) * whole
    first = kept * size * min(pipeline, _micro_batches(config))
    last = kept * size + _logit_bytes(shape, tensor, size)
    return micro_batch_tokens(config) * max(first, last)


def _micro_batches(config: Config) -> int:
    rows = -(-config.global_batch_size // data_ranks(config))
    return rows if config.micro_batch_tokens else -(-rows // config.micro_batch_size)


def _layer_values(shape: ModelShape, tensor_size: int, *, split: bool) -> int:
    """Numbers a token that one layer keeps.

    The two norms' inputs and outputs (`split` over TP under sequence parallelism); queries, keys and values before and
    after rotation, the attention's output, both halves of the MLP and their product.
    """
    heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    norms = 4 * shape.hidden_size // (tensor_size if split else 1)
    return norms + (2 * (heads + kv_heads) + kv_heads + heads + 3 * shape.ffn_size) // tensor_size


def _logit_bytes(shape: ModelShape, tensor_size: int, size: int) -> int:
    """Bytes a token: logits and their gradient, and a float32 softmax."""
    return -(-shape.vocab_size // tensor_size) * (2 * size + 4)
