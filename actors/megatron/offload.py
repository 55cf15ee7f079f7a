"""Tensors that leave their device for a while: their bytes wait in host memory, and come back to the same tensors.

What is taken away are storages, so every tensor, view and parameter on them stays the object it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from actors.megatron.platform import Platform


class Offload:
    """A set of tensors that is on the device or away as a whole."""

    def __init__(self, platform: Platform):
        self.platform = platform
        self.host: torch.Tensor | None = None  # uint8, kept: to lock its pages takes seconds
        self.away: list[tuple[torch.UntypedStorage, int]] = []  # and the bytes of each

    def leave(self, tensors: Iterable[torch.Tensor], *, unchanged: bool = False) -> None:
        """Move the storages of `tensors` to host memory; until `come_back` nothing may touch them. Nothing if away.

        `unchanged`: these tensors are what they were when they left the last time, so that host memory, if they did, still has
        their bytes.
        """
        import torch

        if self.away:
            return
        here = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == self.platform.device.type]
        by_address = {storage.data_ptr(): storage for storage in here if storage.nbytes()}  # views share one
        size = sum(storage.nbytes() for storage in by_address.values())
        there = unchanged and self.host is not None
        if size and (self.host is None or self.host.numel() < size):
            self.host = None  # give its memory back before taking more
            self.host = self.platform.host_memory(size)
        self.away = [(storage, storage.nbytes()) for storage in by_address.values()]
        for source, target in [] if there else self._pairs():
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        for storage, _ in self.away:
            storage.resize_(0)

    def come_back(self) -> None:
        """Every byte where it was. Nothing if not away."""
        import torch

        for storage, length in self.away:
            storage.resize_(length)
        for target, source in self._pairs():
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        self.away = []

    def _pairs(self) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """The bytes of each storage, on the device and in host memory: uint8 [n] both."""
        import torch

        start = 0
        for storage, length in self.away:
            on_device = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            yield on_device, self.host[start : start + length]
            start += length
