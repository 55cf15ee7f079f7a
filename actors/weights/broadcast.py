"""Weights broadcast to all engines at once, over a process group of their own: NCCL between GPUs, gloo between CPUs.

Rank 0 of the group is the sender, the engines are the others. A group is kept from push to push; other engines, or a push
that failed, make a new one. torch's default group, Megatron's in the sender and vLLM's in an engine, has no part in it.
Whatever forms, waits for or closes a group runs in a thread of its own: all of that can block when a peer is gone.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from actors.weights.ledger import PushError
from actors.weights.transport import Connecting

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

DEVICES = {"nccl": "cuda", "gloo": "cpu"}  # where the bytes are, by backend


class Broadcast:
    """The sending side."""

    def __init__(self, backend: str):
        """`backend`: "nccl" or "gloo"."""
        self.backend = backend
        self.engines: dict[int, Any] = {}  # in the group, in the order of their ranks
        self.name = ""  # of the group
        self.formed = 0  # groups so far
        self.group: _Group | None = None
        self.sent = 0  # buckets over this group
        self.held: dict[int, tuple[dist.Work, torch.Tensor]] = {}  # by place

    def connect(self, engines: dict[int, Any], timeout: float) -> Connecting:
        """Form the group of these engines unless it is there. The meeting may take half of `timeout`, seconds."""
        if self.group is not None and engines == self.engines:
            return Connecting()
        import ray
        import torch.distributed as dist

        self.abort()
        host = ray.util.get_node_ip_address()
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
        self.engines, self.name, self.sent = dict(engines), f"{host}:{store.port}", 0
        self.formed += 1
        size = len(engines) + 1

        def form() -> dist.Backend:
            _meet(store, list(engines), timeout / 2)
            return _form(self.backend, store, 0, size, timeout)

        self.group = _Group(form)
        seat = partial(Seat, group=self.name, number=self.formed, size=size, backend=self.backend, timeout=timeout)
        ranked = enumerate(engines.items(), start=1)
        calls = {index: engine.join_push.remote(seat(rank=rank)) for rank, (index, engine) in ranked}
        return Connecting(calls=calls, own=self.group.formed)

    def send(self, data: torch.Tensor) -> BroadcastBytes:
        payload = BroadcastBytes(group=self.name, place=self.sent, size=data.numel())
        self.held[payload.place] = self.group.broadcast(data), data
        self.sent += 1
        return payload

    def release(self, payload: BroadcastBytes) -> None:
        work, _ = self.held.pop(payload.place)
        work.wait()

    def abort(self) -> None:
        self.held.clear()
        if self.group is not None:
            self.group.close()
            self.group = None


@dataclass(frozen=True, kw_only=True)
class BroadcastBytes:
    """The bucket in this place of the order in which a group's buckets are sent."""

    group: str
    place: int  # from 0
    size: int  # bytes

    async def open(self, engine: int) -> torch.Tensor:
        if _membership is None or _membership.seat.group != self.group:
            raise PushError(f"a bucket for the group at {self.group}, which this engine is not in")
        return await _membership.receive(self.place, self.size)


@dataclass(frozen=True, kw_only=True)
class Seat:
    """An engine's place in a group that is being formed."""

    group: str  # the group's name: "ip:port" of the sender's store
    number: int  # of the group, among those that its sender has formed
    rank: int  # from 1; the sender is 0
    size: int  # with the sender
    backend: str
    timeout: float  # seconds to form the group, and for each bucket later

    async def take(self) -> None:
        """In the engine's process: leave the group it was in, join this one. RuntimeError when it does not get complete.

        PushError when a later group has been joined: a call of a push that failed can start after one of the next push.
        """
        global _membership
        if _membership is not None:
            if _membership.seat.number > self.number:
                raise PushError(f"the group at {self.group} is out of date: {_membership.seat.group} has been joined")
            _membership.group.close()
        joined = _membership = _Membership(self)
        await asyncio.wrap_future(joined.group.formed)


def leave_group() -> None:
    """In the engine's process: leave the group it is in; another sender's groups are counted anew."""
    global _membership
    if _membership is not None:
        _membership.group.close()
        _membership = None


class _Membership:
    """The receiving side."""

    def __init__(self, seat: Seat):
        self.seat = seat
        self.group = _Group(self._join)
        self.next_place = 0
        self.turn = asyncio.Condition()

    async def receive(self, place: int, size: int) -> torch.Tensor:
        """The bytes of the bucket in `place`, uint8 [size], complete for whatever stream reads them, in memory of their own.

        Every rank must enter the broadcasts in the same order, and an actor's calls need not start in the order they were
        made in: each waits for its turn. RuntimeError or TimeoutError when the bytes do not come in `seat.timeout`.
        """
        async with asyncio.timeout(self.seat.timeout), self.turn:
            await self.turn.wait_for(lambda: place == self.next_place)
            data, work = await asyncio.wrap_future(_in_thread(lambda: self._enter(size)))
            self.next_place += 1
            self.turn.notify_all()
        await asyncio.wrap_future(_in_thread(work.wait))
        return data

    def _join(self) -> dist.Backend:
        import torch.distributed as dist

        seat, limit = self.seat, timedelta(seconds=self.seat.timeout)
        host, port = seat.group.rsplit(":", 1)
        store = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=limit)
        store.set(str(seat.rank), "here")
        return _form(seat.backend, store, seat.rank, seat.size, seat.timeout)

    def _enter(self, size: int) -> tuple[torch.Tensor, dist.Work]:
        import torch

        data = torch.empty(size, dtype=torch.uint8, device=DEVICES[self.seat.backend])
        return data, self.group.broadcast(data)


_membership: _Membership | None = None  # of this process, once an engine in it has joined a group


class _Group:
    """A process group that is formed, and closed, in a thread."""

    def __init__(self, form: Callable[[], dist.Backend]):
        self.form = form
        self.members: dist.Backend | None = None
        self.formed: Future[None] = _in_thread(self._form)

    def broadcast(self, data: torch.Tensor) -> dist.Work:
        """Start to send `data` from rank 0, to receive it elsewhere; when `formed`, and everywhere in the same order."""
        assert self.members is not None, "the group is closed"
        return self.members.broadcast(data, 0)

    def close(self) -> None:
        """End what is under way, as soon as the group is formed. Returns at once.

        NCCL's broadcasts are aborted; a gloo group keeps whoever drops it until those under way have failed or timed out.
        """
        _in_thread(self._close)

    def _form(self) -> None:
        self.members = self.form()

    def _close(self) -> None:
        self.formed.exception()  # waits
        members, self.members = self.members, None
        if members is not None:
            members.abort()


def _meet(store: dist.Store, engines: list[int], timeout: float) -> None:
    """Wait until every engine is at the store. PushError naming the first that is not there after `timeout` seconds.

    What forms a group cannot say who is missing.
    """
    end = time.monotonic() + timeout
    for rank, index in enumerate(engines, start=1):
        try:
            store.wait([str(rank)], timedelta(seconds=max(end - time.monotonic(), 0.001)))
        except RuntimeError as error:
            late = f"did not join the group of the push in {timeout:g} s, half of push_timeout"
            raise PushError(f"rollout engine {index} {late}") from error


def _form(backend: str, store: dist.Store, rank: int, size: int, timeout: float) -> dist.Backend:
    """A connected group, whose broadcasts fail after `timeout` seconds."""
    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=timeout)
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        with _blocking_wait():
            group = dist.ProcessGroupNCCL(store, rank, size, options)
    else:
        group = dist.ProcessGroupGloo(store, rank, size, limit)
    group.broadcast(torch.zeros(1, dtype=torch.uint8, device=DEVICES[backend]), 0).wait()  # NCCL connects at its first use
    return group


@contextmanager
def _blocking_wait() -> Iterator[None]:
    """An NCCL group made here has no watchdog, which would end the process when a peer is gone.

    Instead, `wait` of its works keeps its thread until the bytes are there, and raises what went wrong or took too long.
    """
    name = "TORCH_NCCL_BLOCKING_WAIT"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _in_thread(function: Callable[[], Any]) -> Future[Any]:
    """Run `function()` in a thread that does not keep the process alive."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:  # goes to who waits for the result
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
