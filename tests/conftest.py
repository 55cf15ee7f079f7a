"""What several test modules share: one Ray, one pair of processes that have imported Megatron, a tiny model and rows for it."""

from pathlib import Path

import pytest

from rlhf.ray_start import start_ray

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def local_ray():
    """One Ray for all tests that need one, never somebody else's cluster."""
    import ray

    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    start_ray(address="local", num_cpus=8, log_to_driver=False, runtime_env={"env_vars": environment})
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def hosts(local_ray):
    """Two processes that build policies."""
    from tests.policy_ranks import start_hosts

    return start_hosts(2)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The folder of a tiny model."""
    from tests.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows():
    """What ranks train on."""
    from tests.policy_ranks import random_rows
    from tests.row_batch import ROWS

    return random_rows(ROWS)


@pytest.fixture(scope="module")
def source(local_ray, rows):
    """`rows` in the object store."""
    import ray

    return ray.put(rows)
