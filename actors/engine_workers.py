"""The workers of an engine: those of one that is split over several devices are processes, and end together with the engine's.

vLLM starts them as children of the engine's process, which is all that Ray sees: when a worker dies it ends too, at once, and
the engine is replaced like any other that died.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

DEATH_SHOWS = 1.0  # seconds: a call can fail, for the others' sake, before a worker's death is seen
QUEUE, REDUCTION = "/dev/shm/psm_", "/dev/shm/vllm_dist_"  # how vLLM's shared memory is named: multiprocessing's, its own on CPUs


class EngineWorkers:
    """Those of one engine, watched from now on; no processes where the only worker lives in the engine's own."""

    def __init__(self, engine: LLMEngine):
        self.engine = engine
        self.processes: Sequence[BaseProcess] = [worker.proc for worker in getattr(engine.model_executor, "workers", [])]
        if self.processes:
            self.call("end_with_engine")
            self._forget_names()
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
            self._end()

    @property
    def _sentinels(self) -> list[int]:
        return [process.sentinel for process in self.processes]

    def _end_together(self) -> None:
        wait(self._sentinels)
        self._end()

    def _end(self) -> None:
        """Without asking: a worker can wait for a dead one, in a collective operation, forever."""
        for process in self.processes:
            process.kill()
        os._exit(1)

    def _forget_names(self) -> None:
        """Unlink the shared memory that every worker has mapped by now: it would outlive processes that are killed."""
        maps = [line for process in self.processes for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()]
        for path in {line.split(maxsplit=5)[-1] for line in maps}:
            if path.startswith((QUEUE, REDUCTION)):
                Path(path).unlink(missing_ok=True)
            if path.startswith(QUEUE):  # else multiprocessing's tracker looks for it, and complains on the terminal
                resource_tracker.unregister(path.removeprefix("/dev/shm"), "shared_memory")
