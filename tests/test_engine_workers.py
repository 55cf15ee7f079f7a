"""What becomes of a process while vLLM starts workers below it, with processes of vLLM's names that do as they are told."""

from __future__ import annotations

import os
import subprocess
import sys

from command import ROOT

SCRIPT = """
import multiprocessing, time
from actors.engine_workers import built_together
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

fork = multiprocessing.get_context("fork")

def start(seconds, name):
    process = fork.Process(target=time.sleep, args=(seconds,), name=name)
    process.start()
    return process

def build(seconds, killed_by):
    first, second = start(seconds, "VllmWorker-0"), start(60, "VllmWorker-1")
    try:
        with built_together():
            time.sleep(2)
            if killed_by == "vLLM":
                MultiprocExecutor._ensure_worker_termination([first, second])
            else:
                second.kill()
            if killed_by != "somebody, this moment":
                second.join()
                time.sleep(0.5)
            raise RuntimeError("what a worker said")
    except RuntimeError:
        first.kill()
        raise SystemExit(3)

for case in [(60, "somebody"), (60, "somebody, this moment"), (1, "somebody"), (60, "vLLM")]:
    process = fork.Process(target=build, args=case)
    process.start()
    process.join()
    print(process.exitcode)
"""


def test_a_killed_worker_ends_the_process_unless_building_has_failed_before():
    """That is: another worker ended by itself, or vLLM, which has heard of an error, ends them all."""
    environment = os.environ | {"VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1"}
    script = [sys.executable, "-c", SCRIPT]
    ended = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert ended.stdout.split() == ["1", "1", "3", "3"], ended.stderr
