"""Tensors packed into buckets on their device, and each bucket's checks: its checksum, and that all values are finite.

The checks are begun when a bucket is complete, and read later: packing never waits for the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from actors.weights.checksum import block_sums, combine_block_sums
from actors.weights.ledger import PushError

if TYPE_CHECKING:
    import torch

ALIGNMENT = 64  # bytes: every tensor of a bucket can be read in place with any dtype


class Packed(NamedTuple):
    """A tensor in a bucket's bytes."""

    name: str
    offset: int
    values: torch.Tensor

    @property
    def end(self) -> int:
        return self.offset + self.values.nbytes


class PackedBucket:
    """A complete bucket, never written to again: its bytes, uint8 [size], and its tensors."""

    def __init__(self, data: torch.Tensor, tensors: list[Packed]):
        self.data, self.tensors = data, tensors
        self._sums, self._extremes = _read_later(block_sums(data)), _read_later(_extremes(data, tensors))

    def checksum(self) -> int:
        """Of the bytes, see `actors.weights.checksum`. Waits for the device."""
        return combine_block_sums(self._sums(), self.data.numel())

    def require_finite(self) -> None:
        """PushError naming a tensor that holds a NaN or an infinity, which would poison a KV cache. Waits for the device."""
        if all(map(math.isfinite, self._extremes())):
            return
        for name, _, values in self.tensors:
            if not all(map(math.isfinite, extremes := _extremes_of(values).tolist())):
                raise PushError("tensor {!r} is not finite (from {} to {})".format(name, *extremes))


def pack(tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[PackedBucket]:
    """Buckets of at most `bucket_bytes` each, or of one larger tensor.

    A tensor is copied before the next is asked for, which may reuse its memory.
    """
    import torch

    buffer, used, entries = None, 0, []
    for name, tensor in tensors:
        size = tensor.nbytes
        padded = -(-size // ALIGNMENT) * ALIGNMENT
        if entries and used + padded > bucket_bytes:
            yield PackedBucket(buffer[:used], entries)
            entries = []
        if not entries:
            buffer, used = torch.empty(max(bucket_bytes, padded), dtype=torch.uint8, device=tensor.device), 0
        values = buffer[used : used + size].view(tensor.dtype).view(tensor.shape)
        entries.append(Packed(name, used, values.copy_(tensor.detach())))
        buffer[used + size : used + padded].zero_()
        used += padded
    if entries:
        yield PackedBucket(buffer[:used], entries)


def _extremes(data: torch.Tensor, tensors: list[Packed]) -> torch.Tensor:
    """The least and the greatest value, NaN where there is one, of neighbours of one dtype with their padding: [2 * runs]."""
    import torch

    runs = [torch.empty(0, dtype=torch.float64, device=data.device)]
    for dtype, neighbours in groupby(tensors, key=lambda entry: entry.values.dtype):
        alike = list(neighbours)
        if dtype.is_floating_point:
            runs.append(_extremes_of(data[alike[0].offset : alike[-1].end].view(dtype)))
    return torch.cat(runs)


def _extremes_of(values: torch.Tensor) -> torch.Tensor:
    """[2] float64; [0] of no values."""
    import torch

    return torch.stack(values.aminmax()).double() if values.numel() else values.double()


def _read_later(values: torch.Tensor) -> Callable[[], list[Any]]:
    """`values.tolist`, which does not wait for what the GPU is given to do between this and that call."""
    import torch

    if not values.is_cuda:
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[Any]:
        arrived.synchronize()
        return host.tolist()

    return read
