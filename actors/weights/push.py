"""The sending side of a weight push: a stream of named tensors, packed into buckets, verified by every engine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from actors.weights.ledger import PushError
from actors.weights.packing import PackedBucket, pack
from actors.weights.transport import ObjectStore, Transport
from rlhf.records import BUCKET_BYTES, Bucket, PushReport

if TYPE_CHECKING:
    import torch

BUCKETS_IN_FLIGHT = 2  # one loads while the next is sent
OWN_POLL = 0.1  # seconds between two looks at what the sender itself does while engines are waited for
DEATH_SHOWS = 2.0  # seconds after which Ray has noticed the death of an actor


def push_weights(
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    engines: dict[int, Any],
    version: int,
    *,
    bucket_bytes: int = BUCKET_BYTES,
    timeout: float = 120.0,
    transport: Transport | None = None,
) -> PushReport:
    """Send every tensor, under its Hugging Face name, to the engines {index: actor}; returns when all acknowledged `version`.

    `named_tensors` is always read to its end, also after a failure: on the other ranks of a collective export somebody
    waits for each tensor. Raises PushError naming the engine, or the tensor that is not finite, or what was refused.
    `transport` may serve one push after the other.
    """
    start, tensors, transport = time.monotonic(), iter(named_tensors), transport or ObjectStore()
    try:
        return _Push(engines, version, transport, start, timeout).send(tensors, bucket_bytes)
    except BaseException:
        transport.abort()
        raise
    finally:
        for _ in tensors:
            pass


class _Push:
    def __init__(self, engines: dict[int, Any], version: int, transport: Transport, start: float, timeout: float):
        self.engines, self.version, self.transport = engines, version, transport
        self.start, self.timeout = start, timeout
        self.in_flight: deque[tuple[Bucket, dict[int, Any]]] = deque()

    def send(self, tensors: Iterator[tuple[str, torch.Tensor]], bucket_bytes: int) -> PushReport:
        begun = self._call("begin_push", self.version)  # answered while the first buckets are packed
        connecting = self.transport.connect(self.engines, self._seconds_left())
        self._wait("join_push", connecting.calls, connecting.own)
        names, num_bytes, num_buckets = [], 0, 0
        for packed in _lookahead(pack(tensors, bucket_bytes)):
            bucket = self._bucket(num_buckets, packed)
            self._wait("begin_push", begun)
            begun = {}
            self.in_flight.append((bucket, self._call("receive_bucket", bucket)))
            names += bucket.names
            num_bytes, num_buckets = num_bytes + bucket.size, num_buckets + 1
            self._await_buckets(BUCKETS_IN_FLIGHT - 1)
        self._await_buckets(0)
        held = self._wait("finish_push", self._call("finish_push", self.version, names))
        if any(answer != (self.version, len(names)) for answer in held):
            raise PushError(f"version {self.version}: {len(names)} tensors sent, engines acknowledged (version, tensors) {held}")
        return PushReport(
            version=self.version,
            num_tensors=len(names),
            num_bytes=num_bytes,
            num_buckets=num_buckets,
            seconds=time.monotonic() - self.start,
        )

    def _bucket(self, index: int, packed: PackedBucket) -> Bucket:
        """Sent after its checks, so that nothing comes between a broadcast and the call by which engines enter it.

        CUDA can make a kernel's first launch, or an allocation, wait for the broadcast, which waits for the engines.
        """
        packed.require_finite()
        found = packed.checksum()
        return Bucket(
            version=self.version,
            index=index,
            payload=self.transport.send(packed.data),
            size=packed.data.numel(),
            names=tuple(tensor.name for tensor in packed.tensors),
            dtypes=tuple(str(tensor.values.dtype).removeprefix("torch.") for tensor in packed.tensors),
            shapes=tuple(tuple(tensor.values.shape) for tensor in packed.tensors),
            offsets=tuple(tensor.offset for tensor in packed.tensors),
            checksum=found,
        )

    def _await_buckets(self, at_most: int) -> None:
        while len(self.in_flight) > at_most:
            bucket, refs = self.in_flight.popleft()
            self._wait(f"receive_bucket {bucket.index}", refs)
            self.transport.release(bucket.payload)

    def _call(self, method: str, *arguments: Any) -> dict[int, Any]:
        return {index: getattr(engine, method).remote(*arguments) for index, engine in self.engines.items()}

    def _seconds_left(self) -> float:
        return max(self.start + self.timeout - time.monotonic(), 0)

    def _wait(self, call: str, refs: dict[int, Any], own: Future[Any] | None = None) -> list[Any]:
        """The engines' answers, when this process's `own` part is done too. The first error ends it.

        When an engine dies, the others may fail first: its death is looked for, and is the error then.
        """
        import ray

        waiting, answers = {ref: index for index, ref in refs.items()}, {}
        try:
            while waiting:
                left = self._seconds_left()
                done, _ = ray.wait(list(waiting), timeout=min(left, OWN_POLL) if own else left)
                if own and own.done():
                    self._require_own(call, own)
                if not done and left == 0:
                    raise PushError(f"{_engines(waiting.values())} did not answer {self._late(call)}")
                for ref in done:
                    index = waiting.pop(ref)
                    answers[index] = self._answer(call, index, ref)
            if own:
                self._require_own(call, own)
        except PushError as error:
            if not isinstance(error.__cause__, ray.exceptions.RayActorError):
                self._look_for_death(call, waiting)
            raise
        return [answers[index] for index in refs]

    def _answer(self, call: str, index: int, ref: Any) -> Any:
        import ray

        try:
            return ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            raise PushError(f"{_engines([index])}, `{call}`: {error.cause}") from error
        except ray.exceptions.RayActorError as error:
            raise PushError(f"{_engines([index])} died during `{call}` of version {self.version}") from error

    def _require_own(self, call: str, own: Future[Any]) -> None:
        try:
            own.result(self._seconds_left())
        except PushError:
            raise
        except TimeoutError:
            raise PushError(f"the sender did not finish its part of {self._late(call)}") from None
        except Exception as error:
            raise PushError(f"the sender's part of `{call}`: {error}") from error

    def _look_for_death(self, call: str, waiting: dict[Any, int]) -> None:
        """Raise PushError for an engine whose death shows soon; `waiting` {call: engine index} are not answered."""
        import ray

        end = time.monotonic() + DEATH_SHOWS
        while waiting and (left := end - time.monotonic()) > 0:
            for ref in ray.wait(list(waiting), timeout=left)[0]:
                try:
                    self._answer(call, waiting.pop(ref), ref)
                except PushError as error:
                    if isinstance(error.__cause__, ray.exceptions.RayActorError):
                        raise

    def _late(self, call: str) -> str:
        return f"`{call}` of version {self.version} in push_timeout ({self.timeout:g} s)"


def _lookahead(buckets: Iterable[PackedBucket]) -> Iterator[PackedBucket]:
    """Each when the next has been packed: the GPU then works on that one while the checks of the first are waited for."""
    before = None
    for bucket in buckets:
        if before is not None:
            yield before
        before = bucket
    if before is not None:
        yield before


def _engines(indices: Iterable[int]) -> str:
    listed = sorted(indices)
    return f"rollout engine{'s' * (len(listed) > 1)} {', '.join(map(str, listed))}"
