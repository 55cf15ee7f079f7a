"""The sending side of a weight push: a stream of named tensors, packed into buckets, verified by every engine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from actors.weights.checksum import checksum
from actors.weights.ledger import PushError
from actors.weights.transport import ObjectStore, Transport
from rlhf.records import Bucket, PushReport

if TYPE_CHECKING:
    import torch

ALIGNMENT = 64  # bytes: every tensor of a bucket can be read in place with any dtype
BUCKETS_IN_FLIGHT = 2  # one loads while the next is packed


def push_weights(
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    engines: list[Any],
    version: int,
    *,
    bucket_bytes: int = 256 << 20,
    timeout: float = 120.0,
    transport: Transport | None = None,
) -> PushReport:
    """Send every tensor, under its Hugging Face name, to every engine; returns when all acknowledged `version`.

    `named_tensors` is always read to its end, also after a failure: on the other ranks of a collective export somebody
    waits for each tensor. Raises PushError naming the engine, or the tensor that is not finite, or what was refused.
    """
    start, tensors = time.monotonic(), iter(named_tensors)
    try:
        return _Push(engines, version, transport or ObjectStore(), start, timeout).send(tensors, bucket_bytes)
    finally:
        for _ in tensors:
            pass


def require_finite(name: str, tensor: torch.Tensor) -> None:
    """PushError naming the tensor when it holds a NaN or an infinity: a NaN would poison the engine's KV cache."""
    import torch

    if tensor.numel() and tensor.is_floating_point():
        low, high = tensor.aminmax()  # a NaN anywhere makes both NaN
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise PushError(f"weights not pushed: tensor {name!r} is not finite (from {low.item()} to {high.item()})")


class _Push:
    def __init__(self, engines: list[Any], version: int, transport: Transport, start: float, timeout: float):
        self.engines, self.version, self.transport = engines, version, transport
        self.start, self.timeout = start, timeout
        self.in_flight: deque[tuple[Bucket, list[Any]]] = deque()

    def send(self, tensors: Iterator[tuple[str, torch.Tensor]], bucket_bytes: int) -> PushReport:
        begun = [engine.begin_push.remote(self.version) for engine in self.engines]  # while the first bucket is packed
        names, num_bytes, num_buckets = [], 0, 0
        for bucket in self._buckets(tensors, bucket_bytes):
            if begun:
                self._wait("begin_push", begun)
                begun = []
            refs = [engine.receive_bucket.remote(bucket) for engine in self.engines]
            self.in_flight.append((bucket, refs))
            names += bucket.names
            num_bytes, num_buckets = num_bytes + bucket.size, num_buckets + 1
            self._await_buckets(BUCKETS_IN_FLIGHT - 1)
        self._await_buckets(0)
        held = self._wait("finish_push", [engine.finish_push.remote(self.version, names) for engine in self.engines])
        if any(answer != (self.version, len(names)) for answer in held):
            raise PushError(f"version {self.version}: {len(names)} tensors sent, engines acknowledged (version, tensors) {held}")
        return PushReport(
            version=self.version,
            num_tensors=len(names),
            num_bytes=num_bytes,
            num_buckets=num_buckets,
            seconds=time.monotonic() - self.start,
        )

    def _buckets(self, tensors: Iterator[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[Bucket]:
        """Copy each tensor as it comes (its memory may be reused) into one flat buffer; a full one becomes a bucket."""
        import torch

        buffer, used, index, entries = None, 0, 0, []
        for name, tensor in tensors:
            tensor = tensor.detach()
            require_finite(name, tensor)
            size = tensor.numel() * tensor.element_size()
            padded = -(-size // ALIGNMENT) * ALIGNMENT
            if entries and used + padded > bucket_bytes:
                yield self._bucket(index, buffer[:used], entries)
                used, index, entries = 0, index + 1, []
            if buffer is None or used + padded > buffer.numel():
                buffer = torch.empty(max(bucket_bytes, padded), dtype=torch.uint8, device=tensor.device)
            buffer[used : used + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            entries.append((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), used))
            used += padded
        if entries:
            yield self._bucket(index, buffer[:used], entries)

    def _bucket(self, index: int, data: torch.Tensor, entries: list[tuple[str, str, tuple[int, ...], int]]) -> Bucket:
        names, dtypes, shapes, offsets = zip(*entries)
        return Bucket(
            version=self.version,
            index=index,
            payload=self.transport.send(data),
            size=data.numel(),
            names=names,
            dtypes=dtypes,
            shapes=shapes,
            offsets=offsets,
            checksum=checksum(data),
        )

    def _await_buckets(self, at_most: int) -> None:
        while len(self.in_flight) > at_most:
            bucket, refs = self.in_flight.popleft()
            self._wait(f"receive_bucket {bucket.index}", refs)
            self.transport.release(bucket.payload)

    def _wait(self, call: str, refs: list[Any]) -> list[Any]:
        import ray

        results = []
        for index, ref in enumerate(refs):
            engine = f"rollout engine {index} of {len(refs)}"
            try:
                left = self.start + self.timeout - time.monotonic()
                results.append(ray.get(ref, timeout=max(left, 0)))
            except ray.exceptions.GetTimeoutError:
                raise PushError(
                    f"{engine} did not answer `{call}` of version {self.version} in push_timeout ({self.timeout:g} s)"
                ) from None
            except ray.exceptions.RayTaskError as error:
                raise PushError(f"{engine}, `{call}`: {error.cause}") from error
            except ray.exceptions.RayActorError as error:
                raise PushError(f"{engine} died during `{call}` of version {self.version}") from error
        return results
