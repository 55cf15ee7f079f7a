"""What needs a CUDA device: `make test-gpu`. With one card, two places share it and NCCL talks over sockets.

One card: of the machine, or of those that CUDA_VISIBLE_DEVICES names.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from rlhf.devices import find_devices
from rlhf.ray_start import start_ray

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT / "configs" / "demo")]
PLACES = 2
SFT_STEPS = 300


def pytest_collection_modifyitems(items) -> None:
    if not find_devices().gpus:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def gpu_ray() -> str:
    """The address of a Ray with two GPU places."""
    import ray

    paths, card = [str(ROOT), str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")], {}
    if find_devices().gpus < PLACES:
        paths.insert(0, str(HERE / "one_card"))
        os.environ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
        if visible := os.environ.pop("CUDA_VISIBLE_DEVICES", None):  # Ray would refuse more places than devices it names
            card = {"CUDA_VISIBLE_DEVICES": visible}
            os.environ["ONE_CARD"] = visible
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # also of the commands that join this Ray
    environment = {"PYTHONPATH": os.environ["PYTHONPATH"], "PYTHONWARNINGS": "ignore"}
    start_ray(address="local", num_gpus=PLACES, log_to_driver=False, runtime_env={"env_vars": environment})
    os.environ.update(card)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    """The demo's model and data."""
    from task import make_data, make_model

    folder = tmp_path_factory.mktemp("demo")
    (folder / "model").mkdir()
    make_model(folder / "model", 0)
    make_data(folder, 0)
    return folder


@pytest.fixture(scope="session")
def taught(gpu_ray, work) -> Path:
    """The demo's model after a little supervised training."""
    import command
    from demo_command import demo

    words = demo("sft", work / "model", work, "sft", train_iters=SFT_STEPS, save_steps=SFT_STEPS)
    status, output = command.run(*words, log=work / "sft.log", address=gpu_ray)
    assert status == 0, output[-4000:]
    return work / "sft" / f"checkpoint-{SFT_STEPS}"
