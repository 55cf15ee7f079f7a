"""How many GPUs there are, and what is in use on them, whoever uses it."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from rlhf.devices import find_devices

NEEDS_TWO = pytest.mark.skipif(find_devices().gpus < 2, reason="needs two GPUs")
MARGIN = 0.2  # GiB that come and go by themselves


def gpu_gib() -> float:
    """In use on all GPUs that this process may use."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={visible}")
    lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    return sum(map(float, lines)) / 1024


def wait_until_free(before: float, deadline: float) -> None:
    """Fails when at `deadline`, on time.monotonic()'s clock, more is in use than `before`, in GiB."""
    while (now := gpu_gib()) > before + MARGIN:
        assert time.monotonic() < deadline, f"{now:.1f} GiB in use, {before:.1f} before the run"
        time.sleep(0.5)
