"""Limits of containers, from folders as the kernel shows them under either version of control groups."""

import os

import pytest

from rlhf import cgroup
from rlhf.cgroup import cpu_quota, memory_limit
from rlhf.devices import find_devices

UNLIMITED = 2**63 - 4096  # what version 1 says of memory without a limit
TWO = {  # one tree; the root has no limits
    "own": "0::/jobs/7\n",
    "jobs/cpu.max": "400000 100000\n", "jobs/memory.max": f"{2**31}\n",
    "jobs/7/cpu.max": "max 100000\n", "jobs/7/memory.max": f"{2**32}\n",
}  # fmt: skip
ONE = {  # in a container: the group's name is that of outside, its files are at the root
    "own": "4:memory:/docker/3f\n3:cpuset:/\n2:cpu,cpuacct:/docker/3f\n0::/\n",
    "cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "50000\n", "memory/memory.limit_in_bytes": f"{2**30}\n",
}  # fmt: skip
FREE_TWO = {"own": "0::/\n", "cpu.max": "max 100000\n", "memory.max": "max\n"}
FREE_ONE = ONE | {"cpu/cpu.cfs_quota_us": "-1\n", "memory/memory.limit_in_bytes": f"{UNLIMITED}\n"}


@pytest.fixture
def within(tmp_path, monkeypatch):
    """Puts this process into a tree of groups."""

    def put(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(cgroup, "ROOT", tmp_path)
        monkeypatch.setattr(cgroup, "OWN", tmp_path / "own")

    return put


@pytest.mark.parametrize(
    ("files", "quota", "limit"),
    [(TWO, 4.0, 2**31), (ONE, 3.0, 2**30), (FREE_TWO, None, None), (FREE_ONE, None, UNLIMITED), ({}, None, None)],
    ids=["version 2", "version 1", "version 2 without limits", "version 1 without limits", "no control groups"],
)
def test_the_tightest_limit_around_this_process_holds(within, files, quota, limit):
    within(files)
    assert (cpu_quota(), memory_limit()) == (quota, limit)


def test_devices_are_what_a_container_may_use(within, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    found = find_devices()
    within({"own": "0::/\n", "cpu.max": "250000 100000\n", "memory.max": f"{2**28}\n"})
    assert (find_devices().cores, find_devices().host_memory) == (2, 2**28)
    within({"cpu.max": "50000 100000\n"})
    assert find_devices().cores == 1
    within(FREE_TWO)
    assert find_devices().cores == 8 and find_devices().host_memory >= found.host_memory
