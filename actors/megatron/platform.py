"""The one place that knows what the machine has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Platform:
    """Where tensors live, how ranks talk, and which of Megatron's kernels are not there."""

    device: torch.device
    backend: str  # of torch.distributed
    model_settings: dict[str, Any] = field(default_factory=dict)  # fields of Megatron's model config


def start_platform() -> Platform:
    """Prepare this process for Megatron: call before megatron or mcore_bridge is imported."""
    import torch

    from actors import cpu

    if torch.cuda.is_available():
        torch.cuda.set_device(0)  # Ray shows a rank its own GPU alone
        return Platform(device=torch.device("cuda", 0), backend="nccl", model_settings={"gradient_accumulation_fusion": False})
    cpu.install()
    kernels = ("gradient_accumulation", "masked_softmax", "bias_activation", "bias_dropout")
    settings = {f"{kernel}_fusion": False for kernel in kernels}
    settings |= {"apply_rope_fusion": False, "overlap_p2p_comm": False, "use_cpu_initialization": True}
    return Platform(device=torch.device("cpu"), backend="gloo", model_settings=settings)
