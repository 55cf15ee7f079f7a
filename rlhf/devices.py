"""What this machine has, found without importing torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from rlhf.cgroup import cpu_quota, memory_limit


@dataclass(frozen=True, kw_only=True)
class Devices:
    """One node's accelerators, or its processor when there are none."""

    gpus: int
    gpu_name: str
    memory: int  # bytes: of one GPU, or of the machine without GPUs
    cores: int
    host_memory: int = 0  # bytes of the machine, or of what a container may take

    @property
    def name(self) -> str:
        return f"{self.gpus} x {self.gpu_name}" if self.gpus else f"CPU, {self.cores} cores"


def find_devices() -> Devices:
    """The GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES lets through; otherwise cores and memory.

    Of a container, what it may use: as Ray counts CPUs, a part of one is not counted beside whole ones.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(cores, max(1, int(cpu_quota() or cores)))
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    listed, host = _gpus(), min(host, memory_limit() or host)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        listed = listed[: len([item for item in visible.split(",") if item.strip() not in ("", "-1")])]
    if listed:
        name, memory = listed[0]
        return Devices(gpus=len(listed), gpu_name=name, memory=memory, cores=cores, host_memory=host)
    return Devices(gpus=0, gpu_name="", memory=host, cores=cores, host_memory=host)


def _gpus() -> list[tuple[str, int]]:
    """Name and memory in bytes of each GPU."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return []
    rows = [line.rsplit(",", 1) for line in text.strip().splitlines() if "," in line]
    return [(name.strip(), int(float(mib) * 2**20)) for name, mib in rows if mib.strip().replace(".", "").isdigit()]
