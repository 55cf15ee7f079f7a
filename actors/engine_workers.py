"""The workers of an engine: those of one that is split over several devices are processes, and end together with the engine's.

vLLM starts them as children of the engine's process, which is all that Ray sees: when a worker dies it ends too, at once, and
the engine is replaced like any other that died. That holds while the engine is built too (`built_together`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import active_children, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

LOOK_SECONDS = 0.1  # between two looks at workers that are being started
WORKER_NAME = "VllmWorker-"  # begins the names that vLLM gives its workers' processes
DEATH_SHOWS = 1.0  # seconds: a call can fail, for the others' sake, before a worker's death is seen
QUEUE, REDUCTION = "/dev/shm/psm_", "/dev/shm/vllm_dist_"  # how vLLM's shared memory is named: multiprocessing's, its own on CPUs


class EngineWorkers:
    """Those of one engine, watched from now on; no processes where the only worker lives in the engine's own."""

    def __init__(self, engine: LLMEngine):
        self.engine = engine
        self.processes: Sequence[BaseProcess] = [worker.proc for worker in getattr(engine.model_executor, "workers", [])]
        if self.processes:
            self.call("end_with_engine")
            _forget_names(process.pid for process in self.processes)
            threading.Thread(target=self._end_together, name="workers", daemon=True).start()

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """What a method of `WorkerExtension` gives in each worker; raises what the first of them raised.

        Not left to vLLM, which after an error takes the next worker's answer for that to the next call.
        """
        answers = self.engine.collective_rpc("answer", args=(method, arguments))
        for _, error in answers:
            if error is not None:
                raise error
        return [result for result, _ in answers]

    def require_alive(self) -> None:
        """To be called when something failed: does not return if that was for the death of a worker."""
        if self.processes and wait(self._sentinels, timeout=DEATH_SHOWS):
            _end(self.processes)

    @property
    def _sentinels(self) -> list[int]:
        return [process.sentinel for process in self.processes]

    def _end_together(self) -> None:
        wait(self._sentinels)
        _end(self.processes)


@contextmanager
def built_together() -> Iterator[None]:
    """While an engine is built: a worker that is killed ends this process, at once.

    A worker that ends by itself has something to tell, such as too little memory: that is left to vLLM, which then ends all
    of them, and kills those that take too long. From there on it means nothing that a worker was killed.
    """
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    building, end_all = Building(), MultiprocExecutor._ensure_worker_termination

    def look_and_end_all(processes: list[BaseProcess]) -> None:
        building.look_for_the_last_time()
        end_all(processes)

    threading.Thread(target=building.look_again_and_again, name="building", daemon=True).start()
    MultiprocExecutor._ensure_worker_termination = staticmethod(look_and_end_all)
    try:
        yield
    except Exception:
        building.look_for_the_last_time()
        raise
    finally:
        building.over.set()
        MultiprocExecutor._ensure_worker_termination = staticmethod(end_all)


class Building:
    """The workers of an engine that is being built."""

    def __init__(self) -> None:
        self.processes: set[BaseProcess] = set()
        self.failed = False  # one has ended by itself
        self.over = threading.Event()
        self.lock = threading.Lock()

    def look_again_and_again(self) -> None:
        while not self.over.wait(LOOK_SECONDS):
            self.look()

    def look_for_the_last_time(self) -> None:
        """When the building has failed, perhaps since a worker was killed a moment ago: waits for its end to show."""
        with self.lock:
            if not self.over.is_set() and self._workers():
                sentinels = {process.sentinel: process for process in self.processes}
                for sentinel in wait(list(sentinels), timeout=DEATH_SHOWS):
                    sentinels[sentinel].join(DEATH_SHOWS)  # its files are closed before its end shows
                self._end_if_killed()
            self.over.set()

    def look(self) -> None:
        """Does not return if a worker was killed, unless one had failed before or vLLM has begun to end them."""
        with self.lock:
            if not self.over.is_set() and self._workers():
                self._end_if_killed()

    def _workers(self) -> set[BaseProcess]:
        self.processes |= {process for process in active_children() if process.name.startswith(WORKER_NAME)}
        return self.processes

    def _end_if_killed(self) -> None:
        ended = [process.exitcode for process in self.processes if process.exitcode is not None]
        if not self.failed and any(code < 0 for code in ended):  # by a signal
            _forget_names([os.getpid(), *(process.pid for process in self.processes)])
            _end(self.processes)
        self.failed = bool(ended)


def _end(processes: Iterable[BaseProcess]) -> None:
    """End them and this one. Without asking: a worker can wait for a dead one, in a collective operation, forever."""
    for process in processes:
        process.kill()
    os._exit(1)


def _forget_names(pids: Iterable[int]) -> None:
    """Unlink the shared memory that these processes have mapped by now: it would outlive processes that are killed."""
    lines: list[str] = []
    for pid in pids:
        with suppress(OSError):  # one that is dead has none
            lines += Path(f"/proc/{pid}/maps").read_text().splitlines()
    for path in {line.split(maxsplit=5)[-1] for line in lines}:
        if path.startswith((QUEUE, REDUCTION)):
            Path(path).unlink(missing_ok=True)
        if path.startswith(QUEUE):  # else multiprocessing's tracker looks for it, and complains on the terminal
            resource_tracker.unregister(path.removeprefix("/dev/shm"), "shared_memory")
