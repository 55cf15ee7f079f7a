"""How much memory of this process's GPU is in use, and what to change when it is too little."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

OF_ENGINES = ("Free memory on device", "memory for the cache blocks", "KV cache memory")  # vLLM's errors: they say what to do
IN_TRAINING = (
    " In training lower micro_batch_tokens or micro_batch_size, or give recompute_granularity full; beside an engine lower "
    "vllm_gpu_memory_utilization."
)


def peak_gib() -> float | None:
    """The most that all processes used since the last call of this, if the others held still, in GiB; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    given_back = torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return (total - free + given_back) / 2**30


@contextmanager
def memory_explained(doing: str) -> Iterator[None]:
    """Turn what torch or vLLM raise in a block for want of memory into a ValueError that tells what to change."""
    try:
        yield
    except (RuntimeError, MemoryError, ValueError) as error:
        if isinstance(error, ValueError):
            known, change = any(words in str(error) for words in OF_ENGINES), ""
        else:
            known, change = "out of memory" in str(error) or isinstance(error, MemoryError), IN_TRAINING
        if not known:
            raise
        first_line = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(f"{doing}: {first_line}.{change} `megaray plan` shows what each phase needs") from error


def require_given_gpus() -> None:
    """ValueError when Ray gave this process a GPU that torch cannot use: it would work on the CPU instead."""
    import ray
    import torch

    given = ray.get_gpu_ids() if ray.is_initialized() else []
    if given and not torch.cuda.is_available():
        raise ValueError(
            f"Ray gave this process GPU {given[0]}, which torch {torch.__version__} cannot use: install torch for this machine's "
            "CUDA (`megaray check` says what is missing), or correct CUDA_VISIBLE_DEVICES"
        )
