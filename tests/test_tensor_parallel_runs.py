"""Whole GRPO runs with an engine on two devices: those of the policy, or its own."""

from __future__ import annotations

import command
import psutil
import pytest
from test_end_to_end import data, grpo, model, plugin  # noqa: F401 fixtures
from test_tensor_parallel_engine import WORKERS, shared_memory

pytestmark = pytest.mark.slow
WIDE = {"vllm_tensor_parallel_size": 2, "cpus_per_rank": 0.5}


def workers(process) -> list[psutil.Process]:
    """Of the engines below the process that started Ray."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if child.cmdline()[:1] and child.cmdline()[0] in WORKERS:
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return sorted(found, key=lambda worker: worker.pid)


@pytest.mark.parametrize(("mode", "ranks"), [("server", 1), ("colocate", 2)])
def test_a_run_learns_and_a_killed_worker_costs_one_engine(model, data, plugin, tmp_path, mode, ranks):  # noqa: F811
    """The engine's logprobs are the policy's after every push: what it samples comes from the weights just trained."""
    options = WIDE | {"vllm_mode": mode, "nproc_per_node": ranks, "train_iters": 24, "save_steps": 24, "lr": 3e-3}
    log, folder, shared = tmp_path / "run.log", tmp_path / "run", shared_memory()
    process = command.start(*grpo(model, data, plugin, tmp_path, "run", **options), log=log)
    try:
        command.wait_until(lambda: len(command.metrics(folder)) >= 4, process, log=log)
        family = psutil.Process(process.pid).children(recursive=True)
        first = workers(process)
        assert [worker.cmdline()[0] for worker in first] == list(WORKERS)
        assert len(command.actors(process, "RolloutEngine")) == 1
        first[1].kill()
        command.wait_until(lambda: set(workers(process)) - set(first), process, log=log)
        assert process.wait(timeout=300) == 0, log.read_text()[-4000:]
    finally:
        process.kill()
    rows = command.metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert max(row["rollout_train_logprob_diff"] for row in rows) < 1e-4
    assert rows[-1]["engine_restarts"] == 1
    first_half, second_half = (sum(row["reward"] for row in part) / 12 for part in (rows[:12], rows[12:]))
    assert second_half > first_half
    assert psutil.wait_procs(family + first, timeout=20)[1] == []
    assert shared_memory() <= shared
