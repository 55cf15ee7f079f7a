"""What several test modules share: one Ray, one pair of processes that have imported Megatron, a tiny model and rows for it."""

from pathlib import Path

import pytest

from rlhf.ray_start import start_ray

ROOT = Path(__file__).resolve().parent.parent
ACTORS = []  # of `hosts`
USERS = set()  # files with tests that use `hosts`


def pytest_collection_modifyitems(items) -> None:
    """What uses `hosts` comes first: beside all that follows these processes would only take memory, and time for threads."""
    USERS.update(item.path for item in items if "hosts" in item.fixturenames)
    items.sort(key=lambda item: item.path not in USERS)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem) -> None:
    if ACTORS and nextitem is not None and nextitem.path not in USERS:  # without a next one Ray has ended, and they with it
        import ray

        for actor in ACTORS:
            ray.kill(actor)
        ACTORS.clear()


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
    """Two processes that build policies. They end with the last module that uses them."""
    from tests.policy_ranks import start_hosts

    started = start_hosts(2)
    ACTORS.extend(started.actors)
    return started


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
