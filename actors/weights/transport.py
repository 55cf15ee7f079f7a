"""How the bytes of a weight push get from a policy rank to a rollout engine.

A transport makes them readable; what `send` returns, a payload, travels inside a `Bucket` as an argument of a Ray call and
opens itself in the engine's process. `broadcast.py` has the one for GPUs that are not shared.
"""

from __future__ import annotations

import warnings
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Payload(Protocol):
    """What the receiving side needs to find the bytes."""

    async def open(self, engine: int) -> torch.Tensor:
        """For this engine: the bytes, uint8 [size], not to be written to; they stay valid as long as the tensor lives."""


@dataclass(frozen=True, kw_only=True)
class Connecting:
    """What must be done before the first bucket: by the engines and, meanwhile, by the sender."""

    calls: dict[int, Any] = field(default_factory=dict)  # `join_push` by engine index: ray.ObjectRef
    own: Future[Any] | None = None


class Transport(Protocol):
    """The sending side, kept from push to push. It keeps a payload until every engine acknowledged its bucket."""

    def connect(self, engines: dict[int, Any], timeout: float) -> Connecting:
        """At the beginning of every push, to the engines {index: actor} it is for; `timeout` in seconds."""

    def send(self, data: torch.Tensor) -> Payload:
        """Make uint8 [size] readable for the engines; it is not written to before it is released."""

    def release(self, payload: Payload) -> None:
        """Every engine is done with this payload."""

    def abort(self) -> None:
        """After a push that failed: nobody waits for what was sent. Returns at once."""


class ObjectStore:
    """Ray's object store: shared memory, read without a copy, on one node; Ray copies it to others once per node."""

    def connect(self, engines: dict[int, Any], timeout: float) -> Connecting:
        """Nothing to do: the store is there."""
        return Connecting()

    def send(self, data: torch.Tensor) -> StoredBytes:
        import ray

        return StoredBytes(ref=ray.put(data.cpu().numpy()))

    def release(self, payload: Payload) -> None:
        """Nothing to do: Ray frees the object when the last reference to it is gone."""

    def abort(self) -> None:
        """Nothing to do, as in `release`."""


@dataclass(frozen=True, kw_only=True)
class StoredBytes:
    """An array in Ray's object store."""

    ref: Any  # ray.ObjectRef

    async def open(self, engine: int) -> torch.Tensor:
        import torch

        array = await self.ref
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the array is read-only, and we only read
            return torch.from_numpy(array)


class CudaIpc:
    """Memory of a GPU that both processes use: the engine maps what the rank holds."""

    def __init__(self, width: int) -> None:
        """`width`: processes of an engine, each of which maps the memory."""
        self.width = width
        self.engines: list[int] = []
        self.held: dict[int, torch.Tensor] = {}  # by what tells payloads apart

    def connect(self, engines: dict[int, Any], timeout: float) -> Connecting:
        """Note whom handles are for; both are on one device."""
        self.engines = list(engines)
        return Connecting()

    def send(self, data: torch.Tensor) -> MappedBytes:
        self.held[data.data_ptr()] = data
        handles = {engine: [Handle.of(data) for _ in range(self.width)] for engine in self.engines}
        return MappedBytes(key=data.data_ptr(), handles=handles)

    def release(self, payload: MappedBytes) -> None:
        del self.held[payload.key]

    def abort(self) -> None:
        self.held.clear()


@dataclass(frozen=True, kw_only=True)
class Handle:
    """Memory of a GPU for one other process, which must map it exactly once.

    torch counts the processes that have not let go of memory yet, 1 for each handle. That of a handle which two have mapped comes
    to -1, which it takes for a large number: the memory would never be free again.
    """

    rebuild: Any  # torch's function that maps the memory
    arguments: tuple[Any, ...]  # for it; the GPU by its number, which is the same for sender and receiver

    @classmethod
    def of(cls, data: torch.Tensor) -> Handle:
        """The process that has `data` keeps it until all others are done."""
        from torch.multiprocessing.reductions import reduce_tensor

        rebuild, arguments = reduce_tensor(data)
        return cls(rebuild=rebuild, arguments=arguments)

    def map(self) -> torch.Tensor:
        return self.rebuild(*self.arguments)


@dataclass(frozen=True, kw_only=True)
class MappedBytes:
    """Handles to the same memory of a GPU."""

    key: int
    handles: dict[int, list[Handle]]  # by engine, one for each of its processes

    async def open(self, engine: int) -> torch.Tensor:
        (handle,) = self.handles[engine]
        return handle.map()


async def for_workers(payload: Payload, engine: int, count: int) -> tuple[torch.Tensor | list[Handle], torch.Tensor | None]:
    """The bytes as an argument for an engine's `count` worker processes, and what is to be kept until they are done.

    On a GPU each of them maps the memory, of its rank or of what this process received. Other memory vLLM copies to them.
    """
    if isinstance(payload, MappedBytes):
        return payload.handles[engine], None
    data = await payload.open(engine)
    return ([Handle.of(data) for _ in range(count)], data) if data.is_cuda else (data, None)
