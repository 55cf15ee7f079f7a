"""Runs reward functions in their actors, with a deadline each, while the rollout engines are still generating.

One thread a worker: it takes the next task, waits for the answer no longer than the deadline, and replaces its process
when that hangs or dies, while the other threads go on. A task is one reward function on one group; when such a call
fails, the group's completions become tasks of their own, so that only those that fail alone lose their reward.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from actors.group import LongWait
from rewards.calling import Failure, Outcome, Request
from rlhf.counts import reward_names
from rlhf.records import Group, Score
from rlhf.reward_process import LOST, RewardProcess, ScoringError

if TYPE_CHECKING:
    from rlhf.model_reward import ModelReward

# A function that hangs or dies costs a deadline and a new process each time: after this many in a row the run ends.
LOST_IN_A_ROW = 32


@dataclass(eq=False, kw_only=True)
class _Step:
    """What one call of `score` waits for; shared by the threads under `Scorer.changed`."""

    number: int
    outcomes: list[tuple[Group, dict[str, list[Outcome]]]] = field(default_factory=list)
    open_outcomes: int = 0  # (function, completion) pairs without an outcome yet
    cancelled: bool = False


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One reward function on some completions of a group."""

    step: _Step
    group: Group
    function: str
    items: tuple[int, ...]
    outcomes: list[Outcome]  # [n], of this function on this group: where the answer goes
    siblings: _Siblings | None = None  # one of these, when a call on the whole group had passed its deadline

    def request(self, max_steps: int | None) -> Request:
        """What travels to the worker."""
        group = self.group
        return Request(
            function=self.function,
            items=self.items,
            texts=tuple(group.texts[item] for item in self.items),
            finish_reasons=tuple(group.finish_reasons[item] for item in self.items),
            prompt_index=group.prompt.index,
            messages=group.prompt.messages,
            columns=group.prompt.columns,
            step=self.step.number,
            max_steps=max_steps,
        )


@dataclass(eq=False)
class _Siblings:
    """The single calls that replace a group call which passed its deadline."""

    waiting: int
    failed: bool = False


class Scorer:
    """Scores groups on `config.reward_workers` workers that `spawn(index)` makes, and by a reward model, if there is one."""

    model: ModelReward | None = None  # scores the groups of a step together, when engines need their devices no more

    def __init__(self, spawn: Callable[[int], Any], config: Any, *, max_steps: int | None = None):
        self.functions: list[str] = list(config.reward_funcs)
        names = reward_names(config)
        self.weights: list[float] = list(config.reward_weights or [1.0] * len(names))
        assert len(self.weights) == len(names), (self.weights, names)
        self.deadline, self.max_steps = config.reward_timeout, max_steps
        self.seconds: dict[str, float] = defaultdict(float)
        self.tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self.changed = threading.Condition()  # guards all that follows, and every _Step
        self.error: Exception | None = None
        self.ready = 0
        self.singly: set[str] = set()  # functions too slow for a whole group, but not for one completion
        self.lost_in_a_row: Counter[str] = Counter()  # by function: timeouts and deaths since its last outcome
        count = config.reward_workers if self.functions else 0
        self.workers = [RewardProcess(index, spawn, config.call_timeout) for index in range(count)]
        self.threads = [threading.Thread(target=self._serve, args=(worker,), daemon=True) for worker in self.workers]
        for thread in self.threads:
            thread.start()

    @property
    def restarts(self) -> int:
        """Processes that were replaced so far."""
        return sum(max(worker.starts - 1, 0) for worker in self.workers)

    def wait_until_ready(self) -> None:
        """Return when every worker has loaded its functions. Raises ScoringError."""
        loading = LongWait("loading the reward functions", lambda: f"  {self.ready} of {len(self.workers)} workers have")
        with self.changed, loading as news:
            while not self.changed.wait_for(lambda: self.error or self.ready == len(self.workers), timeout=news.patience()):
                news.tell()
            self._raise_error()

    def score(self, groups: Iterable[Group], step: int) -> list[tuple[Group, Score]]:
        """Score each group as it arrives; all of them in the order of their prompts.

        Raises ScoringError when no sample has a reward, or when workers cannot be started.
        """
        current = _Step(number=step)
        try:
            for group in groups:
                self._add(current, group)
            start = time.monotonic()
            with self.changed, LongWait("scoring", lambda: f"  {current.open_outcomes} rewards are missing") as news:
                while not self.changed.wait_for(lambda: self.error or not current.open_outcomes, timeout=news.patience()):
                    news.tell()
                self._raise_error()
            if self.model is not None:
                scores = self.model.score([group for group, _ in current.outcomes])
                for (_, outcomes), values in zip(current.outcomes, scores, strict=True):
                    outcomes[self.model.name] = list(values)
            self.seconds["score"] += time.monotonic() - start
        finally:
            current.cancelled = True
        current.outcomes.sort(key=lambda pair: pair[0].prompt.index)
        scored = [(group, self._combined(group, outcomes)) for group, outcomes in current.outcomes]
        if scored and all(reward is None for _, score in scored for reward in score.rewards):
            raise ScoringError(self._nothing_scored(current))
        return scored

    def take_seconds(self) -> dict[str, float]:
        """Seconds spent waiting for scores after the last group had arrived, since the last call of this."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds

    def close(self) -> None:
        """End the workers."""
        for _ in self.threads:
            self.tasks.put(None)
        for worker in self.workers:
            worker.stop()
        for thread in self.threads:
            thread.join(timeout=10)

    def _add(self, step: _Step, group: Group) -> None:
        n = len(group.texts)
        outcomes: dict[str, list[Outcome]] = {name: [None] * n for name in self.functions}
        with self.changed:
            self._raise_error()
            step.outcomes.append((group, outcomes))
            step.open_outcomes += n * len(self.functions)
            singly = set(self.singly)
        for name in self.functions:
            for items in [(item,) for item in range(n)] if name in singly else [tuple(range(n))]:
                self.tasks.put(_Task(step=step, group=group, function=name, items=items, outcomes=outcomes[name]))

    def _serve(self, worker: RewardProcess) -> None:
        """A thread's work: keep one worker alive and give it one task after the other."""
        try:
            worker.start()
            with self.changed:
                self.ready += 1
                self.changed.notify_all()
            while (task := self.tasks.get()) is not None:
                if not task.step.cancelled:
                    answer = worker.call(task.request(self.max_steps), task.group.tokens, self.deadline)
                    self._take(task, answer)
                if not worker.alive:
                    worker.start()
        except Exception as error:  # noqa: BLE001 raised by `score`, in the caller's thread
            with self.changed:
                self.error = self.error or error
                self.changed.notify_all()
        finally:
            worker.stop()

    def _take(self, task: _Task, answer: tuple[Outcome, ...] | Failure) -> None:
        """Note what a call brought, or split it."""
        with self.changed:
            if isinstance(answer, Failure) and answer.kind in LOST:
                self._count_lost(task.function, answer)
            else:
                self.lost_in_a_row[task.function] = 0
            if isinstance(answer, Failure) and len(task.items) > 1:
                self._split(task, answer)
                return
            outcomes = [answer] if isinstance(answer, Failure) else answer
            for item, outcome in zip(task.items, outcomes, strict=True):
                task.outcomes[item] = outcome
            if task.siblings:
                task.siblings.waiting -= 1
                task.siblings.failed |= isinstance(answer, Failure)
                if not task.siblings.waiting and not task.siblings.failed:
                    self.singly.add(task.function)
            task.step.open_outcomes -= len(task.items)
            if not task.step.open_outcomes:
                self.changed.notify_all()

    def _split(self, task: _Task, answer: Failure) -> None:
        siblings = _Siblings(len(task.items)) if answer.kind == "timeout" else None
        for item in task.items:
            self.tasks.put(replace(task, items=(item,), siblings=siblings))

    def _count_lost(self, function: str, failure: Failure) -> None:
        self.lost_in_a_row[function] += 1
        if self.lost_in_a_row[function] >= LOST_IN_A_ROW:
            self.error = self.error or ScoringError(
                f"reward function {function!r} failed {LOST_IN_A_ROW} times in a row. The last: {failure.kind}: {failure.message}"
            )
            self.changed.notify_all()

    def _combined(self, group: Group, outcomes: dict[str, list[Outcome]]) -> Score:
        """The weighted sum over the functions that apply; None where one failed or none applies."""
        failures = Counter(o.kind for values in outcomes.values() for o in values if isinstance(o, Failure))
        rewards: list[float | None] = []
        for values in zip(*outcomes.values()):
            applicable = [(weight, value) for weight, value in zip(self.weights, values) if value is not None]
            if not applicable or any(isinstance(value, Failure) for value in values):
                rewards.append(None)
            else:
                rewards.append(float(sum(weight * value for weight, value in applicable)))
        by_function = {name: tuple(map(_reward, values)) for name, values in outcomes.items()}
        return Score(rewards=tuple(rewards), by_function=by_function, failures=dict(failures))

    def _nothing_scored(self, step: _Step) -> str:
        samples = sum(len(group.texts) for group, _ in step.outcomes)
        for _, outcomes in step.outcomes:
            for name, values in outcomes.items():
                for value in values:
                    if isinstance(value, Failure):
                        return (
                            f"none of the {samples} samples of step {step.number} could be scored. "
                            f"First failure: reward function {name!r}: {value.kind}: {value.message}"
                        )
        return (
            f"none of the {samples} samples of step {step.number} has a reward: "
            f"{', '.join(self.functions)} returned None for each of them"
        )

    def _raise_error(self) -> None:
        if self.error:
            raise self.error


def _reward(outcome: Outcome) -> float | None:
    return None if isinstance(outcome, Failure) else outcome
