"""kill -9 on a rollout engine's process in the midst of its work."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from typing import TYPE_CHECKING

import ray

if TYPE_CHECKING:
    from rlhf.rollout import RolloutEngines


def engine_pid(engines: RolloutEngines, index: int) -> int:
    """The process id of an engine that is ready."""
    return int(re.search(r"pid (\d+)", ray.get(engines.engines[index].report.remote())).group(1))


def kill_while_generating(engines: RolloutEngines, index: int, after: float) -> threading.Thread:
    """kill -9 the engine's process once it has been generating for so many seconds."""
    engine, pid = engines.engines[index], engine_pid(engines, index)

    def kill() -> None:
        while "generating" not in ray.get(engine.report.remote()):
            time.sleep(0.01)
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread
