"""What becomes of a process while vLLM starts workers below it, with processes of vLLM's names that do as they are told."""

from __future__ import annotations

import subprocess
import sys

import pytest
from command import ROOT

SCRIPT = """
import multiprocessing, sys, time
from actors.engine_workers import built_together

def work(seconds):
    time.sleep(seconds)

def start(seconds, name):
    process = multiprocessing.get_context("fork").Process(target=work, args=(seconds,), name=name)
    process.start()
    return process

first, second = start(FIRST, "VllmWorker-0"), start(60, "VllmWorker-1")
try:
    with built_together():
        time.sleep(0.5)
        second.kill()  # a signal from outside; or vLLM's, since the first has failed
        second.join()
        raise RuntimeError("what the first worker said")
except RuntimeError as error:
    print(error)
    first.kill()
    sys.exit(3)
"""


@pytest.mark.parametrize(("first", "status", "output"), [("60", 1, ""), ("0.2", 3, "what the first worker said\n")])
def test_a_killed_worker_ends_the_process_unless_another_has_failed_before(first, status, output):
    script = [sys.executable, "-c", SCRIPT.replace("FIRST", first)]
    ended = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, timeout=30)
    assert (ended.returncode, ended.stdout) == (status, output), ended.stderr
