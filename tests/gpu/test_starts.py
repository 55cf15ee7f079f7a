"""Runs that cannot start: one line that says why, and nothing of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import command
import psutil
import pytest
from cards import gpu_gib, wait_until_free
from demo_command import demo

TIMEOUT = 60  # seconds: of a call to ranks or engines
FILL = """
import torch
for device in range(torch.cuda.device_count()):
    free, total = torch.cuda.mem_get_info(device)
    globals()[f"held_{device}"] = torch.empty(free - total // 20, dtype=torch.uint8, device=device)
print("full", flush=True)
input()
"""


def test_too_few_gpus_are_refused(gpu_ray, work):
    words = demo("rlhf", work / "model", work, "many", vllm_mode="server", **{"rollout.num_engines": 8})
    status, output = command.run(*words, log=work / "many.log", address=gpu_ray)
    assert status == 2
    assert "1 policy ranks + 8 engine places need 9 x 1 GPU = 9, the cluster has 2: lower rollout.num_engines" in output


def test_a_share_that_is_too_small_for_an_engine_is_refused(gpu_ray, work):
    words = demo("rlhf", work / "model", work, "small", vllm_gpu_memory_utilization=0.005)
    status, output = command.run(*words, log=work / "small.log", address=gpu_ray)
    assert status == 2
    line = output.strip().splitlines()[-1]
    assert line.startswith("error: phase generate: vllm_gpu_memory_utilization 0.005 gives an engine 0.7 GiB of a GPU's"), output
    assert "it needs at least" in line and "give vllm_gpu_memory_utilization" in line


def test_memory_that_another_program_holds_is_missed_in_one_line(gpu_ray, work):
    """The plan sees GPUs, not their other users."""
    before = gpu_gib()
    other = subprocess.Popen([sys.executable, "-c", FILL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "full\n"
        words = demo("rlhf", work / "model", work, "full")
        status, output = command.run(*words, log=work / "full.log", address=gpu_ray)
    finally:
        other.kill()
    assert status == 2
    line = output.strip().splitlines()[-1]
    assert line.startswith("error: building the engine: Free memory on device cuda:0 ("), output
    assert "`megaray plan` shows what each phase needs" in line
    assert not command.actors(psutil.Process(), "Policy")
    wait_until_free(before, time.monotonic() + 30)


@pytest.mark.parametrize(
    ("call", "options", "late"),
    [
        ("RolloutEngine.setup", {"vllm_mode": "server"}, "rollout engine 0"),
        ("Policy.setup", {"nproc_per_node": 2, "tensor_model_parallel_size": 2}, "policy ranks"),
    ],
)
def test_what_hangs_while_it_starts_ends_the_run_at_its_deadline(gpu_ray, work, call, options, late):
    """An engine that is not built, and a rank that the others wait for in NCCL."""
    before, log = gpu_gib(), work / f"late-{call}.log"
    words = demo("rlhf", work / "model", work, f"late-{call}", call_timeout=TIMEOUT, **options)
    process = command.start(*words, log=log, address=gpu_ray)
    try:
        (*_, pid) = command.wait_until(lambda: command.actors(psutil.Process(), call), process, log=log)
        os.kill(pid, signal.SIGSTOP)
        status = process.wait(timeout=3 * TIMEOUT)
        ended = time.monotonic()
    finally:
        process.kill()
    output = log.read_text()
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert status == 1 and line.startswith(f"error: {late}") and f"did not finish `setup` within {TIMEOUT} s" in line, output
    while command.actors(psutil.Process(), "Policy") or command.actors(psutil.Process(), "RolloutEngine"):
        assert time.monotonic() < ended + 30, "processes of the run are left"
        time.sleep(0.5)
    wait_until_free(before, ended + 30)
