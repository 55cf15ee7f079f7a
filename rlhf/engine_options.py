"""Checks `--megatron.NAME` and `--vllm.NAME` against the fields that the installed packages declare, without importing them."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

from rlhf.config import Config
from rlhf.option_values import nearest

MEGATRON = {  # package: {file in it: class}
    "megatron": {
        "core/model_parallel_config.py": "ModelParallelConfig",
        "core/transformer/transformer_config.py": "TransformerConfig",
        "core/optimizer/optimizer_config.py": "OptimizerConfig",
        "core/distributed/distributed_data_parallel_config.py": "DistributedDataParallelConfig",
    },
    "mcore_bridge": {"config/model_config.py": "ModelConfig"},
}
VLLM = {"vllm": {"engine/arg_utils.py": "EngineArgs"}}
# Fields of Megatron's that other options, or the way a micro batch is packed and its loss scaled, decide.
OWNED = frozenset(
    """
    params_dtype pipeline_dtype bf16 fp16 tensor_model_parallel_size pipeline_model_parallel_size sequence_parallel
    virtual_pipeline_model_parallel_size num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
    context_parallel_size expert_model_parallel_size expert_tensor_parallel_size
    recompute_granularity recompute_method recompute_num_layers recompute_modules attention_backend deterministic_mode
    cross_entropy_loss_fusion calculate_per_token_loss variable_seq_lengths finalize_model_grads_func grad_scale_func
    overlap_grad_reduce overlap_param_gather gradient_accumulation_fusion optimizer_cpu_offload optimizer_offload_fraction
    use_precision_aware_optimizer moe_aux_loss_coeff moe_z_loss_coeff moe_expert_capacity_factor
    moe_pad_expert_input_to_capacity moe_token_drop_policy moe_router_dtype moe_token_dispatcher_type moe_permute_fusion
    moe_shared_expert_overlap lr min_lr weight_decay clip_grad adam_beta1 adam_beta2 adam_eps use_distributed_optimizer
    num_layers hidden_size padded_vocab_size num_attention_heads task_type hf_config mtp_num_layers
    """.split()
)


# Of vLLM's engine arguments what the push, the logprobs, the turns on a GPU and the sums of its memory rely on.
OWNED_OF_VLLM = frozenset(
    """
    model load_format tensor_parallel_size logprobs_mode worker_extension_cls enable_sleep_mode speculative_config
    gpu_memory_utilization distributed_executor_backend pipeline_parallel_size data_parallel_size
    dtype seed max_model_len max_num_seqs kv_cache_memory_bytes
    """.split()
)


def check_engine_options(config: Config) -> None:
    """Raises ValueError for a name that Megatron or vLLM does not know, and for one that the run itself sets."""
    owned = [f"megatron.{name}" for name in config.megatron if name in OWNED]
    owned += [f"vllm.{name}" for name in config.vllm if name in OWNED_OF_VLLM]
    if owned:
        raise ValueError(f"{owned[0]} is set by the run itself: use the option of its own, if there is one")
    _check("megatron", list(config.megatron), "no field of Megatron's model, optimizer or data-parallel config", MEGATRON)
    _check("vllm", list(config.vllm), "no engine argument of vLLM", VLLM)


def _check(section: str, names: list[str], what: str, declared: dict[str, dict[str, str]]) -> None:
    known = {field for package, files in declared.items() for field in _fields(package, files)} if names else set()
    for name in names:
        if known and name not in known:
            raise ValueError(f"{section}.{name} is {what}{nearest(name, sorted(known), f'{section}.')}")


def _fields(package: str, files: dict[str, str]) -> set[str]:
    """Annotated names in the bodies of the classes; nothing of a package that is not installed."""
    spec = find_spec(package)
    found: set[str] = set()
    for root in spec.submodule_search_locations if spec else ():
        for file, name in files.items():
            for node in ast.parse((Path(root) / file).read_text()).body:
                if isinstance(node, ast.ClassDef) and node.name == name:
                    fields = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
                    found |= {field.id for field in fields if isinstance(field, ast.Name)}
    return found
