"""ActorGroup: the actors of one role. Two verbs, `broadcast` and `scatter`; nothing else dispatches.

No call waits forever: when its deadline passes, or a rank dies, the error names the role, the rank, the call and what every
rank last reported.
"""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray

from rlhf.records import RankInfo, Shard

FIRST_NEWS = 60.0  # seconds
END_SECONDS = 5.0  # for calls that fail at once


class RankFailure(RuntimeError):
    """A rank or an engine died, did not answer before its deadline, or refused what was pushed."""


class LongWait:
    """Tells on standard error what is waited for, and what the actors do: after a minute, two, four, and so on.

    Of a call that is made again and again, after twice the longest time that it took.
    """

    longest: dict[str, float] = {}  # seconds, by call

    def __init__(self, call: str, reports: Callable[[], str]):
        self.call, self.reports = call, reports
        self.start, self.next = time.monotonic(), max(FIRST_NEWS, 2 * self.longest.get(call, 0.0))

    def __enter__(self) -> LongWait:
        return self

    def __exit__(self, *_: object) -> None:
        self.longest[self.call] = max(self.longest.get(self.call, 0.0), time.monotonic() - self.start)

    def patience(self, left: float = math.inf) -> float:
        """Seconds to wait before `tell`, at most `left`."""
        return max(min(left, self.start + self.next - time.monotonic()), 0)

    def get(self, ref: ray.ObjectRef, deadline: float) -> Any:
        """The value; ray's GetTimeoutError at `deadline`, on time.monotonic()'s clock."""
        while True:
            left = deadline - time.monotonic()
            try:
                return ray.get(ref, timeout=self.patience(left))
            except ray.exceptions.GetTimeoutError:
                if left <= 0:
                    raise
                self.tell()

    def tell(self) -> None:
        """When it is time."""
        waited = time.monotonic() - self.start
        if waited >= self.next:
            print(f"{self.call} takes {waited:.0f} s so far:\n{self.reports()}", file=sys.stderr, flush=True)
            self.next *= 2


class ActorGroup:
    """Actors of one role, each with a `report()` method in a concurrency group of its own (what it is doing now)."""

    def __init__(self, role: str, actors: Sequence[Any], *, timeout: float):
        self.role = role
        self.actors = list(actors)
        self.timeout = timeout
        self.seconds: dict[str, float] = defaultdict(float)  # spent waiting, by method, until taken
        self._pings: dict[ray.ObjectRef, int] = {}

    def broadcast(self, method: str, *args: Any) -> list[Any]:
        """Call `method(*args)` on every rank; the ranks' results in order."""
        refs = [getattr(actor, method).remote(*args) for actor in self.actors]
        self._wait(method, refs)
        return ray.get(refs)

    def scatter(
        self,
        method: str,
        shards: Sequence[Any],
        *args: Any,
        timeout: float | None = None,
        option: str = "call_timeout",
    ) -> list[Any]:
        """Call `method(shards[i], *args)` on rank i; the ranks' results in order.

        `timeout`: seconds, when not the group's own; `option`: what its user raises to have more.
        """
        refs = self._scatter(method, shards, *args)
        self._wait(method, refs, timeout, option)
        return ray.get(refs)

    def scatter_refs(self, method: str, shards: Sequence[Any], *args: Any) -> list[ray.ObjectRef]:
        """As `scatter`, for a method of two return values: None, which tells that it is done, and what stays where it is."""
        calls = self._scatter(method, shards, *args)
        self._wait(method, [done for done, _ in calls])
        return [kept for _, kept in calls]

    def take_seconds(self) -> dict[str, float]:
        """Seconds spent in each method since the last call of this."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds

    def _scatter(self, method: str, shards: Sequence[Any], *args: Any) -> list[Any]:
        assert len(shards) == len(self.actors), (self.role, method, len(shards), len(self.actors))
        return [getattr(actor, method).remote(shard, *args) for actor, shard in zip(self.actors, shards)]

    def _wait(self, method: str, refs: list[ray.ObjectRef], timeout: float | None = None, option: str = "call_timeout") -> None:
        timeout = timeout or self.timeout
        start, waiting = time.monotonic(), list(refs)
        with LongWait(f"{self.role}: `{method}`", self.reports) as news:
            while waiting:  # one by one: the first failure is raised while the other ranks may hang in a collective
                left = start + timeout - time.monotonic()
                done, waiting = ray.wait(waiting, num_returns=1, timeout=news.patience(left), fetch_local=False)
                if not done and left <= 0:
                    ranks = [refs.index(ref) for ref in waiting]
                    raise RankFailure(
                        f"{self.role} ranks {ranks} did not finish `{method}` within {timeout:.0f} s (raise {option} if that "
                        f"is too short for your model). Last reports:\n{self.reports()}"
                    )
                news.tell()
                for ref in done:
                    try:
                        ray.get(ref)
                    except ray.exceptions.RayError as error:
                        self._raise_for(method, error)
        self.seconds[method] += time.monotonic() - start

    def _raise_for(self, method: str, error: ray.exceptions.RayError) -> None:
        """Raise RankFailure when a rank has died, otherwise the error of the call that failed.

        When a rank dies, the collectives of the others fail, often before Ray has noticed the death.
        """
        if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, ValueError):
            raise error
        dead = self._dead_rank()
        if dead is None:
            raise error
        reports = f"Last reports:\n{self.reports()}"
        raise RankFailure(f"{self.role} rank {dead} died during `{method}`. {reports}") from error

    def _dead_rank(self, seconds: float = 2.0) -> int | None:
        """The first rank that is found dead within so many seconds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for rank, actor in enumerate(self.actors):
                try:
                    ray.get(actor.report.remote(), timeout=1)
                except ray.exceptions.RayActorError:
                    return rank
                except ray.exceptions.RayError:
                    continue
            time.sleep(0.2)
        return None

    def raise_if_dead(self) -> None:
        """Raise RankFailure when a rank has died. It does not wait: a call looks at the answers to an earlier one's questions."""
        if not self._pings:
            self._pings = {actor.report.remote(): rank for rank, actor in enumerate(self.actors)}
        done, _ = ray.wait(list(self._pings), num_returns=len(self._pings), timeout=0)
        for ref in done:
            rank = self._pings.pop(ref)
            try:
                ray.get(ref)
            except ray.exceptions.RayActorError as error:
                raise RankFailure(f"{self.role} rank {rank} died: {first_line(error)}") from error

    def reports(self, timeout: float = 5.0) -> str:
        """One line a rank: what it is doing now, or that it does not answer."""
        refs = []
        for actor in self.actors:
            try:
                refs.append(actor.report.remote())
            except Exception as error:  # a dead actor may refuse the call at once
                refs.append(error)
        alive = [ref for ref in refs if isinstance(ref, ray.ObjectRef)]
        done = set(ray.wait(alive, num_returns=len(alive), timeout=timeout)[0]) if alive else set()
        lines = []
        for rank, ref in enumerate(refs):
            try:
                text = ray.get(ref) if ref in done else "no answer"
            except Exception as error:
                text = f"dead ({first_line(error)})"
            lines.append(f"  {self.role} rank {rank}: {text}")
        return "\n".join(lines)


class RankGroup(ActorGroup):
    """Megatron ranks. Batches are given by data rank: the ranks that share a data rank work on the same shard."""

    infos: list[RankInfo]
    before_work: Callable[[], None] = staticmethod(lambda: None)  # makes room on devices that are shared by turns

    def setup(self) -> None:
        """Form the process group and load the model on every rank."""
        address = self.actors[0].node_address.remote()
        self._wait("node_address", [address])
        self.infos = self.broadcast("setup", ray.get(address))

    @property
    def data_size(self) -> int:
        """Number of data ranks."""
        return self.infos[0].data_size

    def on_all(self, method: str, *args: Any) -> list[Any]:
        """Call `method(*args)` on every rank, for work that needs the ranks' tensors on their devices."""
        self.before_work()
        return self.broadcast(method, *args)

    def on_shards(self, method: str, shards: Sequence[Shard], *args: Any) -> list[Any]:
        """Call `method(shards[data rank], *args)` on every rank; the results of the ranks that return logprobs and metrics."""
        self.before_work()
        return self._returned(self.scatter(method, self._by_rank(shards), *args))

    def on_shards_refs(self, method: str, shards: Sequence[Shard], *args: Any) -> list[ray.ObjectRef]:
        """As `on_shards`, but what a method with two return values gives stays in the object store."""
        return self._returned(self.every_rank_refs(method, shards, *args))

    def every_rank_refs(self, method: str, shards: Sequence[Shard], *args: Any) -> list[ray.ObjectRef]:
        """As `on_shards_refs`, of all ranks: each keeps its own part."""
        self.before_work()
        return self.scatter_refs(method, self._by_rank(shards), *args)

    def _by_rank(self, shards: Sequence[Shard]) -> list[ray.ObjectRef]:
        stored = [ray.put(shard) for shard in shards]
        return [stored[info.data_rank] for info in self.infos]

    def _returned(self, results: Sequence[Any]) -> list[Any]:
        return [result for result, info in zip(results, self.infos) if info.returns_logprobs]


class EngineGroup(ActorGroup):
    """Engines that work for one copy of a model each: every one has a shard of its own."""

    @property
    def data_size(self) -> int:
        """Number of engines."""
        return len(self.actors)

    def setup(self) -> None:
        """Load the model in every engine."""
        self.broadcast("setup")

    def every_rank_refs(self, method: str, shards: Sequence[Shard], *args: Any) -> list[ray.ObjectRef]:
        """As `scatter_refs`; the name that `RankGroup` has for it."""
        return self.scatter_refs(method, shards, *args)


def first_line(error: Exception) -> str:
    """What an error says first."""
    return str(error).strip().split("\n")[0]


def take_errors(refs: list[ray.ObjectRef]) -> None:
    """Of calls whose answers nobody waits for: Ray prints an error that was not asked for, with its traceback."""
    ended, _ = ray.wait(refs, num_returns=len(refs), timeout=END_SECONDS, fetch_local=False)
    for ref in ended:
        with suppress(ray.exceptions.RayError):
            ray.get(ref)
