"""The controller's side of the rollout engines: who has room takes the next prompt, groups come out as they complete.

Every engine holds the same version of the weights, or none. An engine whose process dies is replaced: set up, given the
current weights, and its unfinished prompts are sampled again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from actors.group import RankFailure
from rlhf.generation import Generation
from rlhf.records import Group, Prompt, PushReport

if TYPE_CHECKING:
    from actors.group import ActorGroup
    from rlhf.config import Config

MAX_DEATHS = 3  # of engines, without one completed group or push in between
REPORT_TIMEOUT = 5.0  # seconds
PUSH_GRACE = 10.0  # seconds beyond push_timeout: the sender's own error, which says more, comes first


class RolloutEngines:
    """The engines of one run. `spawn(index)` creates an engine's actor; their set-up starts at once."""

    def __init__(
        self,
        spawn: Callable[[int], Any],
        *,
        num_engines: int,
        config: Config,
        sender_of: Callable[[int], int] = lambda index: 0,
        neighbours: Sequence[ActorGroup] = (),
    ):
        """`sender_of(index)`: the policy rank that pushes to an engine. `neighbours`: who uses the engines' GPUs by turns."""
        self.spawn, self.config, self.sender_of, self.neighbours = spawn, config, sender_of, neighbours
        self.asleep = False
        self.version = 0  # of the last push
        self.policy: ActorGroup | None = None  # who pushed it
        self.last_push: PushReport | None = None
        self.restarts = 0  # engines replaced so far
        self.stop_words = list(config.stop_words)  # strings and special tokens that end a response
        self.seconds: dict[str, float] = defaultdict(float)
        self.deaths = 0  # since the last completed group or push
        self.engines = [spawn(index) for index in range(num_engines)]
        self.starting = {index: engine.setup.remote() for index, engine in enumerate(self.engines)}

    def setup(self) -> None:
        """Wait until every engine is built. RankFailure names one that died or is not ready in call_timeout."""
        while self.starting:
            index, ref = next(iter(self.starting.items()))
            try:
                self._get(ref, index, "setup", self.config.call_timeout)
            except RayActorError as error:
                self._count_death(index, "setup", error)
                self._respawn(index)
            else:
                del self.starting[index]

    def push(self, policy: ActorGroup) -> PushReport:
        """Give every engine the policy's weights as the next version, verified."""
        self.policy = policy
        self.version += 1
        self.setup()
        if self.asleep:
            for ranks in self.neighbours:
                ranks.broadcast("release_memory")
            self._switch(self._revive, "wake", "weights")
        start = time.monotonic()
        self.last_push = self._push_to(range(len(self.engines)))
        self.seconds["push"] += time.monotonic() - start
        if self.asleep:
            self._switch(self.replace, "wake", "kv_cache")
        self.asleep, self.deaths = False, 0
        return self.last_push

    def sleep(self) -> None:
        """Leave shared GPUs to training: weights and KV cache are gone until the next push. A dead engine is replaced then."""
        if self.neighbours and not self.asleep:
            self._switch(lambda *_: None, "sleep")
            self.asleep = True

    def generate(
        self, prompts: Sequence[Prompt], *, n: int, sampling: Mapping[str, Any] | None = None
    ) -> Iterator[Group]:
        """n responses to every prompt with the current weights; a group comes out when it is complete.

        `sampling` overrides the config's temperature, top_p, top_k, repetition_penalty, max_completion_length and
        stop_words. With `deterministic`, prompts are dealt out instead of pulled, and each engine starts its share at
        once and in order.
        """
        start = time.monotonic()
        self.setup()
        try:
            yield from Generation(self, prompts, n, {"stop_words": self.stop_words} | dict(sampling or {})).groups()
        finally:
            self.seconds["generate"] += time.monotonic() - start

    def take_seconds(self) -> dict[str, float]:
        """Seconds spent in "generate", "push" and "switch" (to sleep and back) since the last call of this."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds

    def replace(self, index: int, call: str, error: RayActorError) -> None:
        """A new engine in the place of one that died during `call`, with the current weights."""
        self._revive(index, call, error)
        if self.policy is not None:
            self._push_to([index])

    def reports(self) -> str:
        """One line an engine: what it is doing now."""
        return "\n".join(f"  rollout engine {index}: {self._report(index)}" for index in range(len(self.engines)))

    def _push_to(self, indices: Sequence[int]) -> PushReport:
        shares: list[dict[int, Any]] = [{} for _ in self.policy.actors]
        for index in indices:
            shares[self.sender_of(index)][index] = self.engines[index]
        try:
            reports = self.policy.scatter(
                "push_weights", shares, self.version, timeout=self.config.push_timeout + PUSH_GRACE
            )
        except (RayTaskError, RayActorError) as error:
            if not self._replace_dead(error):
                raise
            return self._push_to(indices)
        sent = [report for report in reports if report is not None]
        for report in sent:
            if report.version != self.version:
                raise RankFailure(f"a rollout engine holds version {report.version} after the push of {self.version}")
        return sent[0]

    def _switch(self, on_death: Callable[[int, str, RayActorError], None], method: str, *arguments: Any) -> None:
        """Put every engine to sleep, or wake it."""
        start = time.monotonic()
        for index, ref in enumerate([getattr(engine, method).remote(*arguments) for engine in self.engines]):
            try:
                self._get(ref, index, method, self.config.call_timeout)
            except RayActorError as error:
                on_death(index, method, error)
        self.seconds["switch"] += time.monotonic() - start

    def _revive(self, index: int, call: str, error: RayActorError) -> None:
        """A new engine in the place of a dead one, without weights."""
        self._count_death(index, call, error)
        self._respawn(index)
        self.setup()

    def _replace_dead(self, error: Exception) -> bool:
        """After a push that failed: new engines for the dead ones; False when all are alive."""
        dead = [index for index in range(len(self.engines)) if self._is_dead(index)]
        for index in dead:
            self._count_death(index, "push", error)
            self._respawn(index)
        self.setup()
        return bool(dead)

    def _is_dead(self, index: int) -> bool:
        try:
            ray.get(self.engines[index].version.remote(), timeout=REPORT_TIMEOUT)
        except RayActorError:
            return True
        except GetTimeoutError:
            return False
        return False

    def _respawn(self, index: int) -> None:
        ray.kill(self.engines[index])  # if only its connection was lost: there must not be two
        self.engines[index] = self.spawn(index)
        self.starting[index] = self.engines[index].setup.remote()

    def _count_death(self, index: int, call: str, error: Exception) -> None:
        self.restarts += 1
        self.deaths += 1
        if self.deaths > MAX_DEATHS:
            first_line = str(error).strip().split("\n")[0]
            raise RankFailure(
                f"rollout engine {index} died during `{call}`, death {self.deaths} in a row of an engine: {first_line}"
            ) from error

    def _get(self, ref: ray.ObjectRef, index: int, call: str, timeout: float) -> Any:
        try:
            return ray.get(ref, timeout=timeout)
        except GetTimeoutError:
            raise self.late(index, call, timeout) from None

    def late(self, index: int, call: str, timeout: float) -> RankFailure:
        """The error for a call that passed its deadline."""
        return RankFailure(
            f"rollout engine {index} did not finish `{call}` within {timeout:g} s (raise call_timeout if that is too short "
            f"for your model). Last report: {self._report(index)}"
        )

    def _report(self, index: int) -> str:
        try:
            return ray.get(self.engines[index].report.remote(), timeout=REPORT_TIMEOUT)
        except GetTimeoutError:
            return "no answer"
        except RayActorError:
            return "dead"
