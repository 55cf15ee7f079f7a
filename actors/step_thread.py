"""The one thread that builds a vLLM engine, steps it, and runs everything else that touches it between two steps."""

from __future__ import annotations

import asyncio
import itertools
import os
import queue
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from actors.engine_workers import EngineWorkers, built_together
from actors.progress import Progress

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

    from rlhf.records import Batch

Answer = tuple[asyncio.Future, Any, Exception | None]  # who waits, the result, or what went wrong
Finish = Callable[[str, "RequestOutput"], Any]
Watch = Callable[["RequestOutput"], Any]


class Pending(NamedTuple):
    """A request in the engine."""

    done: asyncio.Future
    finish: Callable[[RequestOutput], Any]
    watch: Watch | None


class Held(NamedTuple):
    """A request that waits for the others of its batch."""

    index: int  # its prompt's
    add: Callable[[], None]
    done: asyncio.Future


class StepThread:
    """Lives beside an event loop: calls come from the loop's coroutines, results go back to them."""

    def __init__(self, build: Callable[[], LLMEngine], progress: Progress):
        self.build, self.progress = build, progress
        self.loop = asyncio.get_running_loop()
        self.calls: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self.pending: dict[str, Pending] = {}  # by request id
        self.held: dict[int, list[Held]] = defaultdict(list)  # by batch id
        self.ids = itertools.count()
        self.paused = False
        self.closed: Exception | None = None  # what every new request gets, until `resume`
        self.engine: LLMEngine
        self.workers: EngineWorkers

    @property
    def num_pending(self) -> int:
        """Requests that are in the engine."""
        return len(self.pending)

    async def start(self) -> LLMEngine:
        """Build the engine; its first use, like every other, must come from a `call`."""
        built = self.loop.create_future()
        threading.Thread(target=self._run, args=(built,), name="engine", daemon=True).start()
        return await built

    async def call(self, function: Callable[[], Any]) -> Any:
        """Run `function()` in the thread, between two steps; its result."""
        done = self.loop.create_future()
        self.calls.put(lambda: self._answer(function, done))
        return await done

    def post(self, function: Callable[[], Any]) -> None:
        """Run `function()`, which must not raise, in the thread, between two steps."""
        self.calls.put(function)

    def request(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        finish: Finish,
        *,
        watch: Watch | None = None,
        adapter: LoRARequest | None = None,
    ) -> tuple[Callable[[], None], asyncio.Future[tuple[RequestOutput, Any]]]:
        """A new request: what adds it to the engine (to be run in the thread), and its finished output.

        With the output comes what `finish` said of it, in the thread and before the next step, given the engine's own name of
        the request. `watch` is called in the thread with every output, the finished one too.
        """
        request_id, done = str(next(self.ids)), self.loop.create_future()

        def add() -> None:
            try:
                if self.closed is not None:
                    raise self.closed
                prompt = {"prompt_token_ids": prompt_ids}
                name = self.engine.add_request(request_id, prompt, params, lora_request=adapter)
                self.pending[request_id] = Pending(done, partial(finish, name), watch)
            except Exception as error:  # goes to the caller
                self._deliver([(done, None, error)])

        return add, done

    def hold(self, requests: Sequence[Held], batch: Batch) -> None:
        """In the thread: add them, in the order of their prompts, as soon as the whole batch is here."""
        held = self.held[batch.id]
        held += requests
        if len(held) >= batch.size or self.closed is not None:
            for request in sorted(self.held.pop(batch.id), key=lambda request: request.index):
                request.add()

    def pause(self) -> None:
        """In the thread: no step from now on, once what is being computed has come out. Requests stay, and may be added."""
        core = self.engine.engine_core.engine_core
        if self.pending and core.batch_queue:  # an engine that has slept has neither requests nor all of its memory
            core.pause_scheduler(mode="keep", clear_cache=False)
            try:
                while core.batch_queue and self._step():
                    pass
            finally:
                core.resume_scheduler()  # vLLM would take a paused engine for one that sleeps
        self.paused = True

    def resume(self) -> None:
        """In the thread: go on, with what weights there are now. Requests are read again to where they are: no cache is kept."""
        self.engine.reset_prefix_cache(reset_running_requests=True)  # raises when it cannot
        self.paused, self.closed = False, None

    def close(self, error: Exception) -> None:
        """In the thread: drop every request, and those on their way here too, until `resume`."""
        self.paused, self.closed = False, error
        self._abort(error)

    def _abort(self, error: Exception) -> None:
        """Drop every request, held ones too; whoever waits for one gets `error`."""
        lost = [request for batch in self.held.values() for request in batch] + list(self.pending.values())
        names = list(self.pending)
        self.held.clear()
        self.pending.clear()
        self._deliver([(request.done, None, error) for request in lost])
        if names:
            self.engine.abort_request(names)
            self.workers.call("forget_logprobs")

    def _run(self, built: asyncio.Future) -> None:
        """The thread. What it did not foresee ends the process, which is then replaced: its callers would wait for nobody."""
        try:
            self._build_and_step(built)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _build_and_step(self, built: asyncio.Future) -> None:
        with self.progress.doing("building the engine"):
            try:
                with built_together():
                    self.engine = self.build()
                    self.workers = EngineWorkers(self.engine)
            except Exception as error:  # goes to the caller
                self._deliver([(built, None, error)])
                return
        self._deliver([(built, self.engine, None)])
        while True:
            self.calls.get()()
            while not self.calls.empty():  # let requests that arrive together start together
                self.calls.get()()
            if self.pending and not self.paused:
                with self.progress.doing("generating"):
                    self._step_until_idle()

    def _step_until_idle(self) -> None:
        while self.pending and not self.paused and self._step():
            while not self.calls.empty():
                self.calls.get()()

    def _step(self) -> bool:
        """False when it failed: every request is dropped then."""
        try:
            outputs = self.engine.step()
        except Exception as error:  # goes to the caller
            self.workers.require_alive()
            self._abort(error)
            return False
        for output in outputs:
            if watch := self.pending[output.request_id].watch:
                watch(output)
        finished = [self._finished(output) for output in outputs if output.finished]
        if finished:
            self._deliver(finished)
        return True

    def _finished(self, output: RequestOutput) -> Answer:
        done, finish, _ = self.pending.pop(output.request_id)
        try:
            return done, (output, finish(output)), None
        except Exception as error:  # goes to the caller
            self.workers.require_alive()
            return done, None, error

    def _answer(self, function: Callable[[], Any], done: asyncio.Future) -> None:
        try:
            result, error = function(), None
        except Exception as raised:  # goes to the caller
            self.workers.require_alive()
            result, error = None, raised
        self._deliver([(done, result, error)])

    def _deliver(self, answers: list[Answer]) -> None:
        self.loop.call_soon_threadsafe(_settle, answers)


def _settle(answers: list[Answer]) -> None:
    for done, result, error in answers:
        if done.done():  # its caller is gone
            continue
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)
