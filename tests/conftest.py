"""What several test modules share: one Ray, and one pair of processes that have imported Megatron."""

from pathlib import Path

import pytest

from rlhf.ray_start import start_ray

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def local_ray():
    """One Ray for all tests that need one, never somebody else's cluster."""
    import ray

    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    start_ray(
        address="local", num_cpus=8, log_to_driver=False, runtime_env={"env_vars": environment}
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def hosts(local_ray):
    """Two processes that build policies."""
    from tests.policy_ranks import start_hosts

    return start_hosts(2)
