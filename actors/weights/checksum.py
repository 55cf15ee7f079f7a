"""A checksum that notices a changed word and two swapped ones: plain torch, on any device, near the speed of a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 18  # words of 4 bytes: on a CPU the working set stays in the cache
BLOCKS_AT_ONCE = 128  # on a GPU
MULTIPLIER = 0x9E3779B97F4A7C13  # odd, and 3 mod 8: its powers differ in their low bits
MASK = (1 << 64) - 1


def checksum(data: torch.Tensor) -> int:
    """A 64-bit checksum of uint8 [size], size a multiple of 4, as an unsigned integer.

    Word i of a block counts 2i + 1 times, block b MULTIPLIER ** b times, modulo 2 ** 64. One changed word always
    changes the result (an odd multiple of less than 2 ** 33), and so do two swapped words of one block (less than
    2 ** 33 times less than 2 ** 19). Words have 4 bytes: with 8, a swap of two that
    differ in the highest bit alone would go unseen.
    """
    return combine_block_sums(block_sums(data).tolist(), data.numel())


def block_sums(data: torch.Tensor) -> torch.Tensor:
    """The weighted sum of each block of uint8 [size]: int64 [blocks], on its device."""
    import torch

    assert data.dtype == torch.uint8 and data.dim() == 1 and data.numel() % 4 == 0, (data.dtype, tuple(data.shape))
    words = data.view(torch.int32)
    multipliers = torch.arange(BLOCK, dtype=torch.int64, device=data.device) * 2 + 1
    end = words.numel() // BLOCK * BLOCK
    full, rest = words[:end].view(-1, BLOCK), words[end:]
    sums = [(rows * multipliers).sum(1) for rows in full.split(1 if data.device.type == "cpu" else BLOCKS_AT_ONCE)]
    sums.append((rest * multipliers[: rest.numel()]).sum(0, keepdim=True))
    return torch.cat(sums)


def combine_block_sums(sums: list[int], size: int) -> int:
    """The checksum of `size` bytes with these `block_sums`."""
    total, power = size // 4, 1
    for block_sum in sums:
        total, power = (total + block_sum * power) & MASK, power * MULTIPLIER & MASK
    return total
