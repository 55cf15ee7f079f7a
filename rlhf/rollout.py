"""The controller's side of the rollout engines: who has room takes the next prompt, groups come out as they complete.

Every engine holds the same version of the weights, or none. An engine whose process dies is replaced: set up, given the
current weights, and its unfinished prompts are sampled again.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from actors.group import RankFailure
from rlhf.records import Group, Prompt, PushReport

if TYPE_CHECKING:
    from actors.group import ActorGroup
    from rlhf.config import Config

MAX_DEATHS = 3  # of engines, without one completed group or push in between
REPORT_TIMEOUT = 5.0  # seconds
MAX_PROMPTS_PER_CALL = 4
WATCH_SECONDS = 5.0  # between looks at the policy while engines generate
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
        sleeps: bool = False,
    ):
        """`sender_of(index)`: the policy rank that pushes to an engine. `sleeps`: engines share their GPUs with training."""
        self.spawn, self.config, self.sender_of, self.sleeps = spawn, config, sender_of, sleeps
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
        if self.sleeps and not self.asleep:
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
            yield from _Generation(self, prompts, n, {"stop_words": self.stop_words} | dict(sampling or {})).groups()
        finally:
            self.seconds["generate"] += time.monotonic() - start

    def take_seconds(self) -> dict[str, float]:
        """Seconds spent in "generate" and "push" since the last call of this."""
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
        report = next(report for report in reports if report is not None)
        if report.version != self.version:
            raise RankFailure(f"rollout engine {indices[0]} holds version {report.version} after the push of {self.version}")
        return report

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


class _Call(NamedTuple):
    index: int
    engine: Any
    prompts: list[Prompt]
    tokens: list[ray.ObjectRef]
    deadline: float

    def __str__(self) -> str:
        places = [prompt.index for prompt in self.prompts]
        return f"generate(prompts {min(places)} to {max(places)})"


class _Generation:
    """One call of `generate`: which engine works on which prompt."""

    def __init__(self, owner: RolloutEngines, prompts: Sequence[Prompt], n: int, sampling: Mapping[str, Any] | None):
        self.owner, self.n, self.sampling = owner, n, sampling
        self.timeout = owner.config.call_timeout
        self.calls: dict[ray.ObjectRef, _Call] = {}  # by the reference of the groups' summaries
        self.prompts = list(prompts)
        self.done: set[int] = set()  # indices of prompts whose group came out
        self.waiting: deque[Prompt] = deque()
        # A call costs about a millisecond, as much as ten short responses; but one that waits for many gives out nothing.
        self.per_call = max(1, min(MAX_PROMPTS_PER_CALL, len(self.prompts) // (4 * len(owner.engines))))
        # Prompts that keep an engine's batch full while the controller looks elsewhere.
        self.room = ceil(1.25 * (owner.config.vllm_max_num_seqs or 256) / n) + self.per_call

    def groups(self) -> Iterator[Group]:
        """Every prompt's group, in the order of completion."""
        if self.owner.config.deterministic:
            for index in range(len(self.owner.engines)):
                self._submit_share(index)
        else:
            self.waiting.extend(self.prompts)
            self._fill()
        while self.calls:
            for ref in self._ready():
                if ref in self.calls:
                    yield from self._take(ref)
            self._fill()

    def _ready(self) -> list[ray.ObjectRef]:
        refs = list(self.calls)
        while True:
            ray.wait(refs, num_returns=1, timeout=WATCH_SECONDS, fetch_local=False)
            now = time.monotonic()
            done, working = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
            for call in (self.calls[ref] for ref in working):
                if call.deadline <= now:  # also while others come out
                    raise self.owner.late(call.index, str(call), self.timeout)
            if done:
                return done
            if self.owner.policy is not None:
                self.owner.policy.raise_if_dead()  # a long generation must not hide that nobody will train on it

    def _take(self, ref: ray.ObjectRef) -> Iterator[Group]:
        """The groups of a finished call; none when its engine died (its prompts have been given out again)."""
        call = self.calls[ref]
        try:
            summaries = ray.get(ref)
        except RayActorError as error:
            self._recover(call, error)
            return
        del self.calls[ref]
        for prompt, tokens, summary in zip(call.prompts, call.tokens, summaries, strict=True):
            if prompt.index in self.done:
                continue
            self.done.add(prompt.index)
            self.owner.deaths = 0
            yield Group(
                prompt=prompt,
                tokens=tokens,
                texts=summary.texts,
                finish_reasons=summary.finish_reasons,
                response_lengths=summary.response_lengths,
                weight_version=self.owner.version,
            )

    def _recover(self, lost: _Call, error: RayActorError) -> None:
        prompts = [prompt for call in self.calls.values() if call.engine is lost.engine for prompt in call.prompts]
        self.calls = {ref: call for ref, call in self.calls.items() if call.engine is not lost.engine}
        self.owner.replace(lost.index, str(lost), error)
        if self.owner.config.deterministic:
            self._submit_share(lost.index)
        else:
            self.waiting.extendleft(reversed(prompts))

    def _fill(self) -> None:
        """Give waiting prompts to the engines with the fewest, as long as there is room."""
        load = [0] * len(self.owner.engines)
        for call in self.calls.values():
            load[call.index] += len(call.prompts)
        while self.waiting and min(load) < self.room:
            index = load.index(min(load))
            prompts = [self.waiting.popleft() for _ in range(min(self.per_call, len(self.waiting)))]
            self._submit(index, prompts, together=1)
            load[index] += len(prompts)

    def _submit_share(self, index: int) -> None:
        """All of an engine's prompts, finished ones too: what a request gets can depend on what it runs beside."""
        share = self.prompts[index :: len(self.owner.engines)]
        for first in range(0, len(share), self.per_call):
            self._submit(index, share[first : first + self.per_call], together=len(share))

    def _submit(self, index: int, prompts: list[Prompt], *, together: int) -> None:
        engine = self.owner.engines[index]
        summaries, *tokens = engine.generate.options(num_returns=len(prompts) + 1).remote(
            [prompt.index for prompt in prompts],
            [prompt.token_ids for prompt in prompts],
            self.n,
            self.owner.version,
            self.sampling,
            together,
        )
        self.calls[summaries] = _Call(index, engine, prompts, tokens, time.monotonic() + self.timeout)
