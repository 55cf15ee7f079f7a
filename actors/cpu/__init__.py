"""Real megatron-core and unmodified mcore-bridge on a machine without CUDA and Transformer Engine.

`install()` runs before the first import of `megatron` or `mcore_bridge`. Three independent parts:

- `cuda_names`: device names, streams and random states of `torch.cuda` mean the CPU in this process;
- `transformer_engine`: the few Transformer Engine classes that Megatron wraps, in plain torch, with the same class and
  parameter names, so that layer specs, weight names, LoRA and packing are those of a GPU run;
- `megatron_patches`: what remains in megatron-core itself (random states, type names, optimizer defects).
"""

from __future__ import annotations

_installed = False


def install() -> None:
    """Make Megatron run on this machine's CPU; nothing happens where CUDA is available, or the second time."""
    global _installed
    import torch

    if _installed or torch.cuda.is_available():
        return
    _installed = True
    from actors.cpu import cuda_names, megatron_patches, transformer_engine

    torch._dynamo.config.disable = True  # Megatron's jit_fuser is torch.compile: a C++ compiler run in every process
    cuda_names.install()
    transformer_engine.install()
    megatron_patches.install()
