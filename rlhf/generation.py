"""One generation: which engine works on which prompt. Who has room takes the next one; groups come out as they complete."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray.exceptions import RayActorError

from actors.group import LongWait, take_errors
from rlhf.counts import most_at_a_time
from rlhf.records import Batch, Group, Prompt

if TYPE_CHECKING:
    from rlhf.rollout import RolloutEngines

MAX_PROMPTS_PER_CALL = 4
WATCH_SECONDS = 5.0  # between looks at the policy while engines generate
BATCH_IDS = count()


class Call(NamedTuple):
    """Prompts that an engine works on."""

    index: int
    engine: Any
    prompts: list[Prompt]
    tokens: list[ray.ObjectRef]
    deadline: float

    def __str__(self) -> str:
        places = [prompt.index for prompt in self.prompts]
        return f"generate(prompts {min(places)} to {max(places)})"


class Generation:
    """One call of `generate`: which engine works on which prompt."""

    def __init__(self, owner: RolloutEngines, prompts: Sequence[Prompt], n: int, sampling: Mapping[str, Any] | None):
        self.owner, self.n, self.sampling = owner, n, sampling
        self.timeout = owner.config.call_timeout
        self.calls: dict[ray.ObjectRef, Call] = {}  # by the reference of the groups' summaries
        self.prompts = list(prompts)
        self.done: set[int] = set()  # indices of prompts whose group came out
        self.next_watch = 0.0  # on time.monotonic()'s clock
        self.waiting: deque[Prompt] = deque()
        # A call costs about a millisecond, as much as ten short responses; but one that waits for many gives out nothing.
        self.per_call = max(1, min(MAX_PROMPTS_PER_CALL, len(self.prompts) // (4 * len(owner.engines))))
        # Prompts that keep an engine's batch full while the controller looks elsewhere.
        self.room = ceil(1.25 * most_at_a_time(owner.config) / n) + self.per_call

    def groups(self) -> Iterator[Group]:
        """Every prompt's group, in the order of completion."""
        if self.owner.config.deterministic:
            for index in range(len(self.owner.engines)):
                self._submit_share(index)
        else:
            self.waiting.extend(self.prompts)
            self._fill()
        with LongWait("generation", self.owner.reports) as news:
            while self.calls:
                for ref in self._ready(news):
                    if ref in self.calls:
                        yield from self._take(ref)
                self._fill()

    def _ready(self, news: LongWait) -> list[ray.ObjectRef]:
        refs = list(self.calls)
        while True:
            ray.wait(refs, num_returns=1, timeout=WATCH_SECONDS, fetch_local=False)
            now = time.monotonic()
            done, working = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
            for call in (self.calls[ref] for ref in working):
                if call.deadline <= now:  # also while others come out
                    raise self.owner.late(call.index, str(call), self.timeout)
            if self.owner.policy is not None and now >= self.next_watch:
                self.next_watch = now + WATCH_SECONDS
                self.owner.policy.raise_if_dead()  # a long generation must not hide that nobody will train on it
            if done:
                return done
            news.tell()

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
                weight_version=summary.weight_version,
            )

    def _recover(self, lost: Call, error: RayActorError) -> None:
        """A new engine, and the lost requests again: on shared GPUs all, since every engine sleeps until the new one is there."""
        indices = range(len(self.owner.engines)) if self.owner.neighbours else [lost.index]
        ended = {ref: call for ref, call in self.calls.items() if call.index in indices}
        prompts = [prompt for call in ended.values() for prompt in call.prompts]
        self.calls = {ref: call for ref, call in self.calls.items() if call.index not in indices}
        if lost.engine is self.owner.engines[lost.index]:  # not replaced already, by a push to another one's successor
            self.owner.replace(lost.index, str(lost), error)
        take_errors([ref for summaries, call in ended.items() for ref in (summaries, *call.tokens)])
        if self.owner.config.deterministic:
            for index in indices:
                self._submit_share(index)
        else:
            self.waiting.extendleft(reversed(prompts))

    def _fill(self) -> None:
        """Give waiting prompts to the engines with the fewest, as long as there is room.

        What an engine gets at a time starts together: its batch is full from its first step.
        """
        load = [0] * len(self.owner.engines)
        for call in self.calls.values():
            load[call.index] += len(call.prompts)
        given: list[tuple[int, list[Prompt]]] = []
        while self.waiting and min(load) < self.room:
            index = load.index(min(load))
            prompts = [self.waiting.popleft() for _ in range(min(self.per_call, len(self.waiting)))]
            given.append((index, prompts))
            load[index] += len(prompts)
        sizes: Counter[int] = Counter()
        for index, prompts in given:
            sizes[index] += len(prompts)
        batches = {index: Batch(next(BATCH_IDS), size) for index, size in sizes.items()}
        for index, prompts in given:
            self._submit(index, prompts, batches[index])

    def _submit_share(self, index: int) -> None:
        """All of an engine's prompts, finished ones too: what a request gets can depend on what it runs beside."""
        share = self.prompts[index :: len(self.owner.engines)]
        batch = Batch(next(BATCH_IDS), len(share))
        for first in range(0, len(share), self.per_call):
            self._submit(index, share[first : first + self.per_call], batch)

    def _submit(self, index: int, prompts: list[Prompt], batch: Batch) -> None:
        engine = self.owner.engines[index]
        summaries, *tokens = engine.generate.options(num_returns=len(prompts) + 1).remote(
            [prompt.index for prompt in prompts],
            [prompt.token_ids for prompt in prompts],
            self.n,
            self.owner.version,
            batch,
            self.sampling,
        )
        self.calls[summaries] = Call(index, engine, prompts, tokens, time.monotonic() + self.timeout)
