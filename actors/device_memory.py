"""How much memory of this process's GPU is in use."""

from __future__ import annotations


def peak_gib() -> float | None:
    """The most that all processes used since the last call of this, if the others held still, in GiB; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    given_back = torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return (total - free + given_back) / 2**30
