"""Options whose kernels exist for GPUs only, refused by name where there are none."""

from __future__ import annotations

from rlhf.config import Config
from rlhf.model_folder import ModelShape

# name: why
NEED_GPUS = {
    "optimizer_cpu_offload": "without GPUs the optimizer's state is in host memory anyway",
    "gradient_accumulation_fusion": "it is a CUDA kernel of apex's",
    "moe_permute_fusion": "it is a CUDA kernel of Transformer Engine's",
    "moe_shared_expert_overlap": "it runs the shared expert on a CUDA stream of its own",
}


def refusal_without_gpus(config: Config, shape: ModelShape) -> str | None:
    """Why a run without GPUs is refused, in one line; None when it is not."""
    for name, reason in NEED_GPUS.items():
        idle = name == "moe_shared_expert_overlap" and not shape.ffn_size  # no shared expert: `expert_notes` says so
        if getattr(config, name) and not idle:
            return f"{name} true needs GPUs, there are none: {reason}; leave it out"
    if config.attention_backend == "flash" and shape.experts:
        return "attention_backend flash needs GPUs, there are none: FlashAttention is a CUDA kernel; leave it out"
    return None


def note_without_gpus(config: Config) -> str | None:
    """What an option turns into without GPUs; None when there is nothing to say."""
    if config.attention_backend == "flash":
        return "attention_backend flash: without GPUs it is torch's own flash attention, not the package flash-attn"
    return None
