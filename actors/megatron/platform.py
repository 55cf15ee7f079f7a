"""The one place that knows what the machine has."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from actors.device_memory import require_given_gpus
from actors.weights.broadcast import Broadcast
from actors.weights.transport import CudaIpc, ObjectStore, Transport

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Platform:
    """Where tensors live, how ranks talk, and which of Megatron's kernels are not there."""

    device: torch.device
    backend: str  # of torch.distributed
    model_settings: dict[str, Any] = field(default_factory=dict)  # fields of Megatron's model config
    flash_attention: bool = True  # Transformer Engine finds FlashAttention
    fused_gradients: bool = False  # apex has the kernel that adds weight gradients inside a matrix product

    def release_memory(self) -> None:
        """Give back what torch keeps of freed device memory, to who shares the device."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.ipc_collect()  # what engines are done with
            torch.cuda.empty_cache()

    def host_memory(self, size: int) -> torch.Tensor:
        """uint8 [size] in host memory, page-locked where a GPU copies to and from it. MemoryError when that is refused."""
        import torch

        try:
            memory = torch.empty(size, dtype=torch.uint8)
        except RuntimeError as error:
            raise MemoryError(f"{size / 2**30:.1f} GiB of host memory for offloading: {error}") from error
        if self.device.type == "cuda":
            runtime, address = torch.cuda.cudart(), memory.data_ptr()
            if (status := runtime.cudaHostRegister(address, size, 0)) != runtime.cudaError.success:
                raise MemoryError(f"{size / 2**30:.1f} GiB of host memory cannot be page-locked for offloading: {status}")
            weakref.finalize(memory, runtime.cudaHostUnregister, address)
        return memory

    def transport(self, *, shared_device: bool, width: int) -> Transport:
        """How weights get to engines, `width` processes each; `shared_device`: to those on this rank's own device."""
        if self.device.type != "cuda":
            return ObjectStore()
        return CudaIpc(width) if shared_device else Broadcast(self.backend)


def start_platform() -> Platform:
    """Prepare this process for Megatron: call before megatron or mcore_bridge is imported."""
    import torch

    from actors import cpu

    require_given_gpus()
    gpu = torch.cuda.is_available()
    fused = ("masked_softmax_fusion", "bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion")
    settings = {
        "overlap_p2p_comm": False,  # that is for interleaved stages
        **dict.fromkeys(fused, gpu),  # faster, and 2 of 5 numbers an inner feature of an MLP fewer to keep
    }
    if gpu:
        torch.cuda.set_device(0)  # Ray shows a rank its own GPU alone
        torch._inductor.config.triton.autotune_pointwise = False  # kernels would be tried on copies of the logits
        _make_workspaces()
        return Platform(
            device=torch.device("cuda", 0),
            backend="nccl",
            model_settings=settings,
            flash_attention=find_spec("flash_attn") is not None,
            fused_gradients=find_spec("fused_weight_gradient_mlp_cuda") is not None,
        )
    cpu.install()
    return Platform(device=torch.device("cpu"), backend="gloo", model_settings=settings | {"use_cpu_initialization": True})


def _make_workspaces() -> None:
    """Those of matrix products in this thread, and in the one that runs backward passes.

    Made in the midst of a step, 32 MiB would lie in a block as large as the logits, which torch then cannot give back.
    """
    import torch

    weight = torch.ones(64, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    (weight @ weight).sum().backward()
