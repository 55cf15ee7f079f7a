"""A rollout engine on several devices, in worker processes of its own: what it samples, and that all of it ends together.

The expected numbers come from an engine on one device and from Hugging Face's model in float32.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import ray
from safetensors.torch import load_file, save_file
from test_rollout import (
    TOLERANCE,
    Sender,
    by_prompt,
    check_that_a_push_pauses,
    hugging_face,
    logprob_error,
    one_of,
    push,
    settings,
    some_prompts,
)
from tiny import make_tiny_model

from actors.group import ActorGroup, RankFailure
from actors.rollout import ENVIRONMENT, RolloutEngine
from rlhf.records import Batch
from rlhf.rollout import RolloutEngines

WIDE = 1  # the engine on two devices; engine 0 has one
WORKERS = ("VLLM::Worker_TP0", "VLLM::Worker_TP1")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_tiny_model(folder / name, seed=seed, head_dim=32) for seed, name in enumerate("ab")}


@pytest.fixture(scope="module")
def engines(local_ray, models) -> RolloutEngines:
    """One on one device, one on two."""

    def spawn(index: int):
        kind = ray.remote(max_concurrency=1000)(RolloutEngine)
        config = settings(models["a"], vllm_tensor_parallel_size=index + 1)
        return kind.options(num_cpus=0, runtime_env={"env_vars": ENVIRONMENT}).remote(config, index=index)

    engines = RolloutEngines(spawn, num_engines=2, config=settings(models["a"]))
    yield engines
    for engine in engines.engines:
        ray.kill(engine)


@pytest.fixture(scope="module")
def wide(engines) -> RolloutEngines:
    """The one on two devices, in a run of its own from here on."""
    engines.setup()
    view = one_of(engines, WIDE)
    view.spawn = lambda index: engines.spawn(WIDE)
    yield view
    ray.kill(view.engines[0])


def wide_engine(config, **arguments) -> RolloutEngines:
    """One engine of its own, whose setup has begun."""

    def spawn(index: int):
        kind = ray.remote(max_concurrency=1000)(RolloutEngine)
        return kind.options(num_cpus=0, runtime_env={"env_vars": ENVIRONMENT}).remote(config, index=index, **arguments)

    return RolloutEngines(spawn, num_engines=1, config=config)


def sender(models, *, group: bool = False) -> ActorGroup:
    kind = ray.remote(concurrency_groups={"report": 1})(Sender).options(num_cpus=0)
    return ActorGroup("policy", [kind.remote(models["a"], group=group)], timeout=60)


@pytest.fixture(scope="module")
def policy(local_ray, models) -> ActorGroup:
    return sender(models)


def shared_memory() -> set[str]:
    """Names of what vLLM's processes share."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "vllm_dist_"))}


def workers(engine) -> list[psutil.Process]:
    """The engine's own children that run a part of its model."""
    (pid,) = [int(word) for word in ray.get(engine.report.remote()).split("pid ")[1:]]
    children = psutil.Process(pid).children()
    return sorted((child for child in children if child.cmdline()[:1] and child.cmdline()[0] in WORKERS), key=lambda c: c.pid)


@pytest.mark.parametrize("group", [False, True], ids=["object store", "broadcast"])
def test_two_devices_answer_as_one_and_as_hugging_face_after_every_push(engines, models, group) -> None:
    policy = sender(models, group=group)
    for name in "ab":
        push(engines, policy, models[name])
        prompts = some_prompts(8)
        greedy = [by_prompt(one_of(engines, i).generate(prompts, n=1, sampling={"temperature": 0})) for i in (0, WIDE)]
        assert {index: ids for index, (ids, _) in greedy[0].items()} == {index: ids for index, (ids, _) in greedy[1].items()}
        for index, (_, logprobs) in greedy[0].items():
            assert greedy[1][index][1][0] == pytest.approx(logprobs[0], abs=TOLERANCE)
        sampled = list(one_of(engines, WIDE).generate(prompts, n=4))
        assert logprob_error(hugging_face(models[name]), sampled) <= TOLERANCE
    assert len(workers(engines.engines[WIDE])) == 2


def test_a_damaged_bucket_is_refused_and_a_complete_push_heals(wide, policy, models) -> None:
    with pytest.raises(
        RankFailure, match="were not pushed: rollout engine 0, `receive_bucket 0`: bucket 0 .* damaged on the way"
    ):
        push(wide, policy, models["a"], "flipped bit")
    with pytest.raises(RuntimeError, match="has no complete push"):
        list(wide.generate(some_prompts(1), n=1))
    push(wide, policy, models["b"])
    assert logprob_error(hugging_face(models["b"]), list(wide.generate(some_prompts(4), n=2))) <= TOLERANCE


def test_a_push_pauses_responses_of_two_devices(wide, policy, models) -> None:
    push(wide, policy, models["b"])
    check_that_a_push_pauses(wide, policy, models["b"], models["a"])


def test_an_engine_that_slept_gets_the_weights_again_before_it_answers(wide, policy, models, monkeypatch) -> None:
    monkeypatch.setattr(wide, "neighbours", [policy])
    push(wide, policy, models["a"])
    wide.make_room(policy)
    with pytest.raises(RuntimeError, match="asked for weight version .* but has no complete push"):
        ray.get(wide.engines[0].generate.options(num_returns=1).remote([], [], 1, wide.version, Batch(-1, 0)))
    assert logprob_error(hugging_face(models["a"]), list(wide.generate(some_prompts(4), n=2))) <= TOLERANCE


@pytest.mark.slow
def test_a_killed_worker_takes_the_engine_with_it_which_is_replaced(wide, policy, models) -> None:
    push(wide, policy, models["b"])
    before, old = wide.restarts, workers(wide.engines[0])
    groups = wide.generate(some_prompts(60), n=4, sampling={"max_completion_length": 64})
    got = [next(groups)]
    old[1].kill()
    got += list(groups)
    assert sorted(group.prompt.index for group in got) == list(range(60))
    assert wide.restarts == before + 1
    assert psutil.wait_procs(old, timeout=10)[1] == []
    assert logprob_error(hugging_face(models["b"]), got) <= TOLERANCE
    assert not {worker.pid for worker in old} & {worker.pid for worker in workers(wide.engines[0])}


def family(engine) -> list[psutil.Process]:
    """The engine's process and all below it; none before it has one."""
    report = ray.get(engine.report.remote())
    engine = psutil.Process(int(report.split("pid ")[1]))
    return [engine, *engine.children(recursive=True)]


def starting_workers(engine) -> list[psutil.Process]:
    """Processes that vLLM has spawned below the engine's, whatever they are called by now."""
    found = []
    for process in family(engine)[1:]:
        try:
            words = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if words[:1] and (words[0] in WORKERS or "spawn_main" in " ".join(words)):
            found.append(process)
    return sorted(found, key=lambda process: process.pid)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["spawned", "loading"])
def test_a_worker_killed_while_its_engine_is_built_costs_one_engine(local_ray, policy, models, moment, capsys) -> None:
    shared = shared_memory()
    engines = wide_engine(settings(models["a"], vllm_tensor_parallel_size=2))
    first, deadline = engines.engines[0], time.monotonic() + 200

    def there() -> bool:
        workers = starting_workers(first)
        return len(workers) == 2 and (moment == "spawned" or all(worker.cmdline()[0] in WORKERS for worker in workers))

    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "building the engine" in ray.get(first.report.remote())
    old = family(first)
    starting_workers(first)[1].kill()
    push(engines, policy, models["b"])
    assert engines.restarts == 1 and engines.engines[0] is not first
    assert capsys.readouterr().out.count("rollout engine 0 died while it was built: another one takes its place\n") == 1
    assert logprob_error(hugging_face(models["b"]), list(engines.generate(some_prompts(4), n=2))) <= TOLERANCE
    assert psutil.wait_procs(old, timeout=20)[1] == []
    rest = family(engines.engines[0])
    ray.kill(engines.engines[0])
    assert psutil.wait_procs(rest, timeout=20)[1] == []
    assert shared_memory() <= shared


@pytest.mark.slow
def test_an_engine_that_cannot_be_built_is_not_built_again(local_ray, models, tmp_path) -> None:
    """The workers find a tensor too small: vLLM's error comes out, and nothing is retried."""
    folder = tmp_path / "broken"
    shutil.copytree(models["a"], folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name][:, :64].contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    engines = wide_engine(settings(folder, vllm_tensor_parallel_size=2), load_weights=True)
    with pytest.raises(ray.exceptions.RayTaskError, match="WorkerProc initialization failed due to an exception"):
        engines.setup()
    assert engines.restarts == 0
    ray.kill(engines.engines[0])


@pytest.mark.slow
@pytest.mark.parametrize("end", ["ray.kill", "SIGKILL"])
def test_nothing_is_left_of_an_engine_that_is_killed(local_ray, policy, models, end) -> None:
    shared = shared_memory()
    engines = wide_engine(settings(models["a"], vllm_tensor_parallel_size=2))
    push(engines, policy, models["a"])
    children = workers(engines.engines[0])
    family = children[0].parent().children(recursive=True)
    assert len(children) == 2 and set(children) <= set(family)
    if end == "ray.kill":
        ray.kill(engines.engines[0])
    else:
        os.kill(children[0].ppid(), signal.SIGKILL)
    assert psutil.wait_procs(family, timeout=20)[1] == []
    assert shared_memory() <= shared
