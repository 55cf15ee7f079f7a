"""How the bytes of a weight push get from a policy rank to a rollout engine.

A transport makes them readable; what `send` returns, a payload, travels inside a `Bucket` as an argument of a Ray call and
opens itself in the engine's process.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Payload(Protocol):
    """What the receiving side needs to find the bytes."""

    async def open(self) -> torch.Tensor:
        """The bytes, uint8 [size], not to be written to; they stay valid as long as the tensor lives."""


class Transport(Protocol):
    """The sending side. It keeps a payload until every engine acknowledged its bucket."""

    def send(self, data: torch.Tensor) -> Payload:
        """Make uint8 [size] readable for the engines; `data` may be overwritten as soon as this returns."""

    def release(self, payload: Payload) -> None:
        """Every engine is done with this payload."""


class ObjectStore:
    """Ray's object store: shared memory, read without a copy, on one node; Ray copies it to others once per node."""

    def send(self, data: torch.Tensor) -> StoredBytes:
        import ray

        return StoredBytes(ref=ray.put(data.cpu().numpy()))

    def release(self, payload: Payload) -> None:
        """Nothing to do: Ray frees the object when the last reference to it is gone."""


@dataclass(frozen=True, kw_only=True)
class StoredBytes:
    """An array in Ray's object store."""

    ref: Any  # ray.ObjectRef

    async def open(self) -> torch.Tensor:
        import torch

        array = await self.ref
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the array is read-only, and we only read
            return torch.from_numpy(array)


class CudaIpc:
    """Memory of a GPU that both processes use: the engine maps what the rank holds."""

    def __init__(self) -> None:
        self.held: dict[int, torch.Tensor] = {}  # by what tells payloads apart

    def send(self, data: torch.Tensor) -> MappedBytes:
        from torch.multiprocessing.reductions import reduce_tensor

        copy = data.clone()
        self.held[copy.data_ptr()] = copy
        rebuild, arguments = reduce_tensor(copy)
        return MappedBytes(key=copy.data_ptr(), rebuild=rebuild, arguments=arguments)

    def release(self, payload: MappedBytes) -> None:
        del self.held[payload.key]


@dataclass(frozen=True, kw_only=True)
class MappedBytes:
    """A handle to memory of this GPU."""

    key: int
    rebuild: Any  # torch's function that maps the memory
    arguments: tuple[Any, ...]

    async def open(self) -> torch.Tensor:
        return self.rebuild(*self.arguments)
