"""Whole runs on GPUs: by turns on one GPU and with engines on their own; learning, deaths, offloading, resuming."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from statistics import fmean

import command
import psutil
import pytest
from cards import NEEDS_TWO, gpu_gib, wait_until_free
from demo_command import demo

GENERATIONS = 60
NOT_REPEATED = re.compile("seconds|tokens_per_second|.*gpu_gib.*")


def repeated(folder: Path) -> list[dict]:
    """The metrics of a run that are the same when it is made again."""
    return [{name: value for name, value in row.items() if not NOT_REPEATED.fullmatch(name)} for row in command.metrics(folder)]


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_it_learns_through_the_death_of_an_engine_and_a_dead_rank_ends_it(gpu_ray, work, taught, mode):
    """60 generations of sums; then the GPU is free again within 30 s of the death of a rank."""
    before = gpu_gib()
    folder, log = work / mode, work / f"{mode}.log"
    options = {"vllm_mode": mode, "train_iters": 100000, "lr_decay_style": "constant", "min_lr": 0}
    process = command.start(*demo("rlhf", taught, work, mode, **options), log=log, address=gpu_ray)
    try:
        command.wait_until(lambda: len(command.metrics(folder)) >= 5, process, log=log)
        (engine,) = command.actors(psutil.Process(), "RolloutEngine")
        os.kill(engine, signal.SIGKILL)
        command.wait_until(lambda: len(command.metrics(folder)) >= GENERATIONS, process, log=log)
        (rank,) = command.actors(psutil.Process(), "Policy")
        os.kill(rank, signal.SIGKILL)
        killed = time.monotonic()
        assert process.wait(timeout=30) == 1
        wait_until_free(before, killed + 30)
    finally:
        process.kill()
    rows = command.metrics(folder)
    print(mode, [round(row["reward"], 2) for row in rows], rows[-1])
    assert re.search("^error: policy rank 0 died", log.read_text(), re.MULTILINE), log.read_text()[-3000:]
    assert rows[-1]["engine_restarts"] == 1
    rewards = [row["reward"] for row in rows]
    assert fmean(rewards[-5:]) >= fmean(rewards[:5]) + 0.15, rewards
    assert max(row["rollout_train_logprob_diff"] for row in rows) <= 0.03
    for phase in ("train", "push", "generate"):
        assert 0 < rows[-1][f"max_gpu_gib_{phase}"] and 0 < rows[-1][f"predicted_gpu_gib_{phase}"]


def test_offloading_and_resuming_change_nothing(gpu_ray, work, taught):
    """One run with everything offloaded against one without that is killed and continued meanwhile: bit for bit."""
    options = {"deterministic": "true", "train_iters": 16, "save_steps": 8}
    words = demo("rlhf", taught, work, "offloaded", offload_model="true", offload_optimizer="true", **options)
    offloaded = command.start(*words, log=work / "offloaded.log", address=gpu_ray)
    arguments = demo("rlhf", taught, work, "killed", offload_model="false", offload_optimizer="false", **options)
    log = work / "killed.log"
    process = command.start(*arguments, log=log, address=gpu_ray)
    command.wait_until((work / "killed" / "checkpoint-8").exists, process, log=log)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (work / "killed" / "checkpoint-16").exists()
    status, output = command.run(*arguments, "--resume_from_checkpoint", "auto", log=log, address=gpu_ray)
    assert status == 0, output[-4000:]
    status, output = command.ended(offloaded, log=work / "offloaded.log")
    assert status == 0, output[-4000:]
    rows = list(zip(repeated(work / "offloaded"), repeated(work / "killed"), strict=True))
    differ = {a["step"]: {name: (a[name], b[name]) for name in a if a[name] != b[name]} for a, b in rows}
    assert differ == dict.fromkeys(differ, {})
    weights = [(work / name / "checkpoint-16" / "model.safetensors").read_bytes() for name in ("offloaded", "killed")]
    assert weights[0] == weights[1]


@NEEDS_TWO
def test_tensor_parallel_ranks_push_to_an_engine_each(gpu_ray, work, taught):
    """TP2 with a reference, and two engines; with and without offloading, bit for bit."""
    options = {"nproc_per_node": 2, "tensor_model_parallel_size": 2, "sequence_parallel": "true", "beta": 0.04}
    options |= {"deterministic": "true", "train_iters": 8, "rollout.num_engines": 2, "steps_per_generation": 1}
    runs = []
    for offload in ("true", "false"):
        name = f"tp2-{offload}"
        words = demo("rlhf", taught, work, name, offload_model=offload, offload_optimizer=offload, **options)
        status, output = command.run(*words, log=work / f"{name}.log", address=gpu_ray)
        assert status == 0, output[-4000:]
        runs.append(repeated(work / name))
    assert runs[0] == runs[1]
    assert max(row["rollout_train_logprob_diff"] for row in runs[0]) <= 0.03
    assert runs[0][0]["kl"] == pytest.approx(0, abs=1e-6)  # the policy is the reference still
    assert runs[0][-1]["kl"] > 1e-4


@NEEDS_TWO
def test_an_engine_over_two_gpus_takes_turns_with_tensor_parallel_ranks(gpu_ray, work, taught):
    """Its workers, each on its own GPU, read every bucket on the GPU of the rank that pushes."""
    options = {"nproc_per_node": 2, "tensor_model_parallel_size": 2, "vllm_tensor_parallel_size": 2, "train_iters": 16}
    words = demo("rlhf", taught, work, "wide", offload_model="true", offload_optimizer="true", **options)
    status, output = command.run(*words, log=work / "wide.log", address=gpu_ray)
    assert status == 0, output[-4000:]
    differences = [row["rollout_train_logprob_diff"] for row in command.metrics(work / "wide")]
    print("wide", differences)
    assert len(differences) == 4 and max(differences) <= 0.03
