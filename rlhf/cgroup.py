"""The limits of the control groups that this process is in, as a container or a batch system sets them (cgroups(7)).

Version 1 has a tree of groups for each controller, version 2 one tree for all; a group's limit holds for all groups in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")  # lines of number:controllers:group, without controllers for version 2


def cpu_quota() -> float | None:
    """CPUs whose time this process may use in all; None: as many as there are."""
    quotas = [line.split() for line in _limits("cpu", "cpu.max")]  # "max 100000": no limit
    quotas += zip(_limits("cpu", "cpu.cfs_quota_us"), _limits("cpu", "cpu.cfs_period_us"))  # -1: no limit
    return min((int(quota) / int(period) for quota, period in quotas if quota.isdecimal()), default=None)


def memory_limit() -> int | None:
    """Bytes of memory that this process and its children may take; None: as many as there are."""
    limits = [*_limits("memory", "memory.max"), *_limits("memory", "memory.limit_in_bytes")]
    return min((int(limit) for limit in limits if limit.isdecimal()), default=None)


def _limits(controller: str, name: str) -> Iterator[str]:
    """What the files `name` say of this process's group and of those around it."""
    for group in _groups(controller):
        try:
            yield (group / name).read_text().strip()
        except OSError:  # this version, or the outermost group, has no such file
            continue


def _groups(controller: str) -> Iterator[Path]:
    """Folders from the outermost group to this process's own; in a container that sees itself alone the former is its own."""
    try:
        lines = OWN.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            tree = ROOT / controller if controllers else ROOT
            parts = Path(own).parts[1:]
            yield from (tree.joinpath(*parts[:depth]) for depth in range(len(parts) + 1))
