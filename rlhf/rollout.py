"""The controller's side of the rollout engines: who has room takes the next prompt, groups come out as they complete.

Every engine holds the same version of the weights, or none. An engine whose process dies is replaced: set up, given the
current weights, and its unfinished prompts are sampled again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from actors.group import ActorGroup, LongWait, RankFailure, first_line, take_errors
from actors.weights.ledger import PushError
from rlhf.generation import Generation
from rlhf.records import Group, GroupSummary, Prompt, PushReport

if TYPE_CHECKING:
    import numpy as np

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
        start: Callable[[Any], ray.ObjectRef] = lambda engine: engine.setup.remote(),
        sender_of: Callable[[int], int] = lambda index: 0,
        neighbours: Sequence[ActorGroup] = (),
    ):
        """`start(engine)`: what makes it ready. `sender_of(index)`: the policy rank that pushes to an engine.

        `neighbours` use the engines' GPUs by turns: engines that have some sleep after their set-up. They are to be set up
        before the engines' own `setup`, since vLLM measures what they left.
        """
        self.spawn, self.config, self.start = spawn, config, start
        self.sender_of, self.neighbours = sender_of, neighbours
        self.asleep = bool(neighbours)
        self.away: list[ActorGroup] = []  # neighbours that have left the GPUs
        self.version = 0  # of the last push
        self.policy: ActorGroup | None = None  # who pushed it
        self.last_push: PushReport | None = None
        self.restarts = 0  # engines replaced so far
        self.stop_words = list(config.stop_words)  # strings and special tokens that end a response
        self.seconds: dict[str, float] = defaultdict(float)
        self.deaths = 0  # since the last completed group or push
        self.gpu_gib: float | None = None  # the most that was in use on an engine's GPU since the last push
        self.engines: list[Any] = [None] * num_engines
        self.places = num_engines // config.rollout.engines_per_device  # engine i is on place i % places
        self.starting: dict[int, ray.ObjectRef | None] = {}  # not ready: their set-up, None when it has not begun
        for index in range(num_engines):
            self._spawn(index)

    def setup(self) -> None:
        """Wait until every engine is built, each within call_timeout from its beginning; one that dies meanwhile is replaced.

        RankFailure names one that is late, or died after too many others. What fails without a death is raised as it is.
        """
        deadlines: dict[int, float] = {}  # a successor has no more time
        if self.starting and self.neighbours:
            self._leave(weights=True)
        while self.starting:
            started = self._start_next()
            for each in started:
                deadlines.setdefault(each, time.monotonic() + self.config.call_timeout)
            index, ref = next(iter(started.items()))
            try:
                self._get(ref, index, "setup", deadlines[index])
            except RayActorError as error:
                self._count_death(index, "setup", error)
                print(f"rollout engine {index} died while it was built: another one takes its place", flush=True)
                self._respawn(index)
            else:
                del self.starting[index]

    def push(self, policy: ActorGroup) -> PushReport:
        """Give every engine the policy's weights as the next version, verified.

        An engine with a GPU of its own pauses what it is sampling, and goes on with the new weights. By turns that is lost, and
        so it is when the push fails.
        """
        self.policy, self.gpu_gib = policy, None
        self.version += 1
        try:
            self._push_to_all()
        except Exception:
            take_errors([engine.give_up_push.remote(self.version) for engine in self.engines])
            raise
        self.deaths = 0
        return self.last_push

    def make_room(self, ranks: ActorGroup) -> None:
        """Have `ranks` on the GPUs they share with engines, which sleep: weights and KV cache are gone until the next push.

        An engine that died is replaced at that push.
        """
        start = time.monotonic()
        self._sleep()
        if ranks in self.away:
            ranks.broadcast("enter_device")
            self.away.remove(ranks)
        self.seconds["switch"] += time.monotonic() - start

    def generate(self, prompts: Sequence[Prompt], *, n: int, sampling: Mapping[str, Any] | None = None) -> Iterator[Group]:
        """n responses to every prompt with the current weights; a group comes out when it is complete.

        `sampling` overrides the config's temperature, top_p, top_k, repetition_penalty, max_completion_length and
        stop_words; its `excluded_ids` are never sampled. With `deterministic`, prompts are dealt out instead of pulled, and
        each engine starts its share at once and in order. Engines that made room since the last push get the weights again.
        """
        if self.asleep and self.policy is not None:
            self.push(self.policy)
        start, elsewhere = time.monotonic(), self.seconds["push"] + self.seconds["switch"]
        self.setup()
        try:
            yield from Generation(self, prompts, n, {"stop_words": self.stop_words} | dict(sampling or {})).groups()
            peaks, _ = self._ask("peak_gib")
            self.gpu_gib = max((gib for gib in [self.gpu_gib, *peaks] if gib is not None), default=None)
        finally:
            elsewhere = self.seconds["push"] + self.seconds["switch"] - elsewhere  # to replace an engine
            self.seconds["generate"] += time.monotonic() - start - elsewhere

    def stream(self, token_ids: np.ndarray) -> Iterator[str | GroupSummary]:
        """One response to a prompt [P] from the first engine: pieces of its text as they are sampled, then its summary."""
        self.setup()
        sampling = {"stop_words": self.stop_words}
        items = self.engines[0].stream.options(num_returns="streaming").remote(token_ids, self.version, sampling)
        timeout = self.config.call_timeout
        while True:
            if not ray.wait([items], timeout=timeout)[0]:
                raise self.late(0, "stream", timeout)
            try:
                yield ray.get(next(items))
            except StopIteration:
                return
            except RayActorError as error:
                raise RankFailure(f"rollout engine 0 died during `stream`: {first_line(error)}") from error

    def mend(self) -> list[int]:
        """Replace engines that died while nothing was asked of them; which ones."""
        _, dead = self._ask("version")
        self._replace_dead(dead, "version")
        self.deaths = 0
        return sorted(dead)

    def metrics(self) -> dict[str, Any]:
        """What the log says of the engines: the version they answer for, how often one was replaced, memory in use on GPUs."""
        gpus = {"max_gpu_gib_push": self.last_push.gpu_gib, "max_gpu_gib_generate": self.gpu_gib}
        in_use = {name: gib for name, gib in gpus.items() if gib is not None}
        return {"weight_version": self.version, "engine_restarts": self.restarts} | in_use

    def take_seconds(self) -> dict[str, float]:
        """Seconds spent in "generate", "push" and "switch" (of a GPU between its users) since the last call of this."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds

    def replace(self, index: int, call: str, error: RayActorError) -> None:
        """A new engine in the place of one that died during `call`, with the current weights.

        Where the policy has to come back to shared GPUs for that, the other engines sleep meanwhile: their requests are lost.
        """
        self._count_death(index, call, error)
        self._sleep()  # the new one looks at what memory is free
        self._respawn(index)
        self.setup()
        if self.policy is not None:
            self._push_to_all() if self.neighbours else self._push_to([index])

    def reports(self) -> str:
        """One line an engine: what it is doing now."""
        return "\n".join(f"  rollout engine {index}: {self._report(index)}" for index in range(len(self.engines)))

    def _push_to_all(self) -> None:
        """The policy's weights to every engine. On shared GPUs engines wake for it: weights first, then the KV cache."""
        self.setup()
        if self.neighbours:
            self.make_room(self.policy)
            self._leave(weights=False)
            if not self._wake("weights"):
                return self._push_to_all()
        report = self._push_to(range(len(self.engines)))
        if report is None:
            return self._push_to_all()
        if self.neighbours:
            self._leave(weights=True)
            if not self._wake("kv_cache"):
                return self._push_to_all()
            self.asleep = False
        self.last_push = report

    def _push_to(self, indices: Sequence[int]) -> PushReport | None:
        """Dead engines are replaced; None when others lost their state with them."""
        shares: list[dict[int, Any]] = [{} for _ in self.policy.actors]
        for index in indices:
            shares[self.sender_of(index)][index] = self.engines[index]
        limit = {"timeout": self.config.push_timeout + PUSH_GRACE, "option": "push_timeout"}
        start = time.monotonic()
        try:
            reports = self.policy.scatter("push_weights", shares, self.version, **limit)
        except (RayTaskError, RayActorError) as error:
            dead = [index for index in range(len(self.engines)) if self._is_dead(index)]
            if not dead and isinstance(error, RayTaskError) and isinstance(error.cause, PushError):
                raise RankFailure(f"the weights of version {self.version} were not pushed: {error.cause}") from error
            if not dead:
                raise
            self._replace_dead(dict.fromkeys(dead, error), "push")
            return None if self.neighbours else self._push_to(sorted({*indices, *dead}))
        self.seconds["push"] += time.monotonic() - start
        sent = [report for report in reports if report is not None]
        for report in sent:
            if report.version != self.version:
                raise RankFailure(f"a rollout engine holds version {report.version} after the push of {self.version}")
        gpus = [report.gpu_gib for report in sent if report.gpu_gib is not None]
        return replace(sent[0], gpu_gib=max(gpus, default=None))

    def _leave(self, *, weights: bool) -> None:
        """The neighbours leave their GPUs to the engines; `weights`: the policy's too, which a push needs there."""
        start = time.monotonic()
        for ranks in self.neighbours:
            ranks.broadcast("leave_device", weights or ranks is not self.policy)
        self.away = list(self.neighbours)
        self.seconds["switch"] += time.monotonic() - start

    def _sleep(self) -> None:
        """Put engines that have neighbours to sleep."""
        if self.neighbours and not self.asleep:
            self._ask("sleep")
            self.asleep = True

    def _wake(self, tag: str) -> bool:
        """Wake every engine. False when one had died: they have been replaced."""
        start = time.monotonic()
        _, dead = self._ask("wake", tag)
        self.seconds["switch"] += time.monotonic() - start
        self._replace_dead(dead, "wake")
        return not dead

    def _ask(self, method: str, *arguments: Any) -> tuple[list[Any], dict[int, RayActorError]]:
        """The answers of the engines that are alive, and what happened to the others."""
        answers, dead = [], {}
        for index, ref in enumerate([getattr(engine, method).remote(*arguments) for engine in self.engines]):
            try:
                answers.append(self._get(ref, index, method))
            except RayActorError as error:
                dead[index] = error
        return answers, dead

    def _replace_dead(self, dead: Mapping[int, Exception], call: str) -> None:
        """New engines for those that died during a push; on shared GPUs for all: the others are neither awake nor asleep."""
        for index, error in dead.items():
            self._count_death(index, call, error)
        for index in range(len(self.engines)) if dead and self.neighbours else dead:
            self._respawn(index)
        self.setup()

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
        self._spawn(index)

    def _spawn(self, index: int) -> None:
        """Start an engine's process, and its set-up too where it need not wait for the neighbours."""
        engine = self.engines[index] = self.spawn(index)
        if self.neighbours:
            engine.load_libraries.remote()
        self.starting[index] = None if self.neighbours else self.start(engine)

    def _start_next(self) -> dict[int, ray.ObjectRef]:
        """Begin the set-up of engines that wait for it, one at a time on a place: each looks at what memory is free there.

        All that are being set up.
        """
        busy = {index % self.places for index, ref in self.starting.items() if ref is not None}
        for index, ref in self.starting.items():
            if ref is None and index % self.places not in busy:
                self.starting[index] = self.start(self.engines[index])
                busy.add(index % self.places)
        return {index: ref for index, ref in self.starting.items() if ref is not None}

    def _count_death(self, index: int, call: str, error: Exception) -> None:
        self.restarts += 1
        self.deaths += 1
        if self.deaths > MAX_DEATHS:
            raise RankFailure(
                f"rollout engine {index} died during `{call}`, death {self.deaths} in a row of an engine: {first_line(error)}"
            ) from error

    def _get(self, ref: ray.ObjectRef, index: int, call: str, deadline: float | None = None) -> Any:
        timeout = self.config.call_timeout
        try:
            with LongWait(f"rollout engine {index}: `{call}`", self.reports) as news:
                return news.get(ref, deadline or time.monotonic() + timeout)
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
