"""How much memory of this process's GPU is in use, and what to change when it is too little."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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
    """Turn an out-of-memory error of a block, of torch or of vLLM, into a ValueError that tells what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "out of memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        first_line = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{doing}: {first_line}. In training lower micro_batch_tokens or micro_batch_size, or give recompute_granularity "
            "full; beside an engine lower vllm_gpu_memory_utilization. `megaray plan` shows what each phase needs"
        ) from error
