"""Weights broadcast to several receivers over a real process group (gloo), between real Ray actors without an engine."""

from __future__ import annotations

import asyncio
import os
import time

import pytest
import ray

from actors.weights.checksum import checksum
from actors.weights.ledger import PushError

SIZES = [300, 5000, 70, 7, 1200, 1200, 1200, 40]  # float32; buckets of 4 KiB: some hold several, one is larger than that
TIMEOUT = 6.0  # seconds


class Receiver:
    """Answers a push as an engine does, and keeps the tensors. `fault`: what goes wrong in the first push."""

    def __init__(self, fault: str = ""):
        self.fault, self.groups, self.tensors = fault, [], {}

    async def setup(self) -> None:
        """What takes seconds."""
        import torch

        if torch.cuda.is_available():
            torch.zeros(1, device="cuda")

    async def begin_push(self, version: int) -> None:
        self.tensors = {}

    async def join_push(self, seat) -> None:
        if self.fault == "absent":
            self.fault = ""
            await asyncio.Event().wait()
        if self.fault == "dies joining":
            os._exit(1)
        await seat.take()
        self.groups.append(seat.group)

    async def receive_bucket(self, bucket) -> None:
        if bucket.index == 2 and self.fault == "stuck":
            self.fault = ""
            await asyncio.Event().wait()
        if bucket.index == 2 and self.fault == "dies":
            os._exit(1)
        if bucket.index in (0, 1) and self.fault == "out of order":  # the calls in flight change places
            await asyncio.sleep(0.5 * (1 - bucket.index))
        data = await bucket.payload.open(0)
        if checksum(data) != bucket.checksum:
            raise PushError(f"bucket {bucket.index} was damaged")
        for name, shape, offset in zip(bucket.names, bucket.shapes, bucket.offsets):
            self.tensors[name] = data[offset : offset + 4 * shape[0]].clone()

    async def finish_push(self, version: int, names: list[str]) -> tuple[int, int]:
        return version, len(self.tensors)

    async def state(self) -> tuple[int, list[str]]:
        """A checksum of the tensors held, by name, and the groups that were joined."""
        import torch

        return checksum(torch.cat([self.tensors[name] for name in sorted(self.tensors)])), self.groups


class Sender:
    """Keeps its transport from push to push, as a policy rank does."""

    def __init__(self, backend: str = "gloo", timeout: float = TIMEOUT):
        from actors.weights.broadcast import Broadcast

        self.transport, self.timeout = Broadcast(backend), timeout
        self.device = "cuda" if backend == "nccl" else "cpu"

    def push(self, engines: dict, version: int, scale: int = 1) -> int:
        """Push random tensors, `scale` times as large; the checksum a receiver must then hold."""
        import torch

        from actors.weights.push import push_weights

        generator = torch.Generator().manual_seed(version)
        weights = {f"tensor {i}": torch.randn(scale * size, generator=generator).to(self.device) for i, size in enumerate(SIZES)}
        report = push_weights(
            weights.items(), engines, version, bucket_bytes=4096 * scale, timeout=self.timeout, transport=self.transport
        )
        assert report.num_buckets >= 4 and report.num_tensors == len(SIZES)
        return checksum(torch.cat([weights[name].view(torch.uint8) for name in sorted(weights)]))


@pytest.fixture(scope="module")
def sender(local_ray):
    return ray.remote(Sender).options(num_cpus=0).remote()


def receivers(*faults: str, gpus: float = 0) -> dict:
    kind = ray.remote(max_concurrency=100)(Receiver).options(num_cpus=0, num_gpus=gpus)
    engines = {index: kind.remote(fault) for index, fault in enumerate(faults)}
    ray.get([engine.setup.remote() for engine in engines.values()])
    return engines


def push(sender, engines: dict, version: int, scale: int = 1) -> list[list[str]]:
    """Every engine holds the tensors of `version` then; the groups each has joined so far."""
    expected = ray.get(sender.push.remote(engines, version, scale))
    states = ray.get([engine.state.remote() for engine in engines.values()])
    assert [held for held, _ in states] == [expected] * len(engines)
    return [groups for _, groups in states]


def test_a_group_is_kept_while_its_engines_are_the_same(sender) -> None:
    engines = receivers("", "", "")
    first = push(sender, engines, 1)
    assert len(first[0]) == 1 and first[0] == first[1] == first[2]
    assert push(sender, engines, 2) == first
    alone = push(sender, {1: engines[1]}, 2)
    assert len(alone[0]) == 2
    assert [len(groups) for groups in push(sender, engines, 3)] == [2, 3, 2]


def test_buckets_keep_their_order_when_calls_start_in_another(sender) -> None:
    push(sender, receivers("out of order", ""), 1)


FAILURES = {
    "absent": "rollout engine 1 did not join the group of the push in",
    "dies joining": "rollout engine 1 died during `join_push` of version 1",
    "dies": "rollout engine 1 died during `receive_bucket [0-2]` of version 1",
    "stuck": r"rollout engines? .*1.* did not answer `receive_bucket 2` of version 1 in push_timeout",
}


@pytest.mark.parametrize("fault", FAILURES)
def test_an_engine_that_fails_is_named_in_time_and_the_next_push_forms_another_group(sender, fault) -> None:
    engines = receivers("", fault, "")
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=FAILURES[fault]):
        ray.get(sender.push.remote(engines, 1))
    assert time.monotonic() - start < TIMEOUT + 3  # the time that a death may take to show
    if "dies" in fault:
        engines |= {1: receivers("")[0]}
    groups = push(sender, engines, 1)
    assert groups[0][-1] == groups[1][-1] == groups[2][-1]
    assert len(groups[0]) == (1 if "join" in fault or fault == "absent" else 2)
