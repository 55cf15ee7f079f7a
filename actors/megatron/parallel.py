"""The process group of a role's ranks, Megatron's parallel groups in it, and random seeds."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

from actors.megatron.platform import Platform
from rlhf.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class ParallelSizes:
    """How many ranks share a model, and how."""

    tensor: int
    pipeline: Pipeline
    sequence: bool  # split activations outside of tensor-parallel regions along the sequence
    expert: int = 1  # ranks that share the experts of a layer; they are ranks of data and tensor parallelism elsewhere
    expert_tensor: int = 1  # ranks that share one expert

    @property
    def token_multiple(self) -> int:
        """Packed micro batches have a multiple of this many tokens."""
        return self.tensor if self.sequence else 1


def start_process_group(
    platform: Platform,
    sizes: ParallelSizes,
    *,
    rank: int,
    world_size: int,
    master: str,
    listener: socket.socket | None,
    seed: int,
    timeout: float,
) -> None:
    """Meet the other ranks at `master` ("ip:port"), which on rank 0 `listener` is bound to, and form Megatron's groups.

    Pipeline stages draw different random numbers; tensor ranks draw equal ones outside of their own tracked state.
    Raises ValueError when the ranks do not divide into models.
    """
    if world_size % (sizes.tensor * sizes.pipeline.size):
        raise ValueError(
            f"{world_size} ranks do not divide into models of tensor_model_parallel_size {sizes.tensor} x "
            f"pipeline_model_parallel_size {sizes.pipeline.size}"
        )
    if world_size % (sizes.expert * sizes.expert_tensor * sizes.pipeline.size):
        raise ValueError(
            f"{world_size} ranks do not divide by expert_model_parallel_size {sizes.expert} x expert_tensor_parallel_size "
            f"{sizes.expert_tensor} x pipeline_model_parallel_size {sizes.pipeline.size}"
        )
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"})  # mcore-bridge reads them
    import torch.distributed as dist

    host, port = master.rsplit(":", 1)
    limit = timedelta(seconds=timeout)
    listening = {} if listener is None else {"is_master": True, "master_listen_fd": listener.detach()}
    store = dist.TCPStore(host, int(port), world_size, timeout=limit, **listening)
    dist.init_process_group(platform.backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        sizes.tensor,
        sizes.pipeline.size,
        expert_model_parallel_size=sizes.expert,
        expert_tensor_parallel_size=sizes.expert_tensor,
        distributed_timeout_minutes=max(1, timeout // 60),
    )
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    _seed_everything(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _seed_everything(seed: int) -> None:
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def returns_results() -> bool:
    """Whether this rank is the one of its model that returns logprobs and metrics: last pipeline stage, tensor rank 0."""
    from megatron.core import parallel_state

    return parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
