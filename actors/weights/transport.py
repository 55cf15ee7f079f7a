"""How the bytes of a weight push get from a policy rank to a rollout engine.

One small interface, so that CUDA IPC (same GPU) and NCCL (another GPU or node) can stand behind it. A payload is
whatever the receiving side needs to find the bytes; it travels inside a `Bucket`, as an argument of a Ray call.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Transport(Protocol):
    """Both ends of the way. The sender keeps the payload until every engine acknowledged its bucket."""

    def send(self, data: torch.Tensor) -> Any:
        """Make uint8 [size] readable for the engines; `data` may be overwritten as soon as this returns."""

    async def receive(self, payload: Any, size: int) -> torch.Tensor:
        """The bytes, uint8 [size], not to be written to; they stay valid as long as the tensor lives."""

    def release(self, payload: Any) -> None:
        """Sending side: every engine is done with this payload."""


class ObjectStore:
    """Ray's object store: shared memory, read without a copy, on one node; Ray copies it to others once per node."""

    def send(self, data: torch.Tensor) -> Any:
        import ray

        return ray.put(data.cpu().numpy())

    async def receive(self, payload: Any, size: int) -> torch.Tensor:
        import torch

        array = await payload
        assert array.nbytes == size, (array.nbytes, size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the array is read-only, and we only read
            return torch.from_numpy(array)

    def release(self, payload: Any) -> None:
        """Nothing to do: Ray frees the object when the last reference to it is gone."""
