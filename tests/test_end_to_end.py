"""Whole runs by their command, with real Ray, Megatron and vLLM: learning, kill and resume, deaths of actors."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import command
import psutil
import pytest
from safetensors.numpy import load_file
from tiny import make_tiny_model

TIMES = ("seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), head_dim=32)  # the smallest that vLLM has on CPU


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    with open(path, "w") as file:
        for a in range(40):
            row = {"messages": [{"role": "user", "content": f"what is {a}+{a}?"}], "solution": str(2 * a)}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "variety.py"
    path.write_text("def variety(completions, **columns):\n    return [len(set(text)) / 10 for text in completions]\n")
    return path


def grpo(model: Path, data: Path, plugin: Path, output: Path, name: str, **options) -> list:
    """A small GRPO command; `options` replace these."""
    defaults = {
        "rlhf_type": "grpo", "model": model, "dataset": data, "external_plugins": plugin, "reward_funcs": "variety",
        "template_backend": "jinja", "output_dir": output, "run_name": name, "num_generations": 4, "global_batch_size": 16,
        "micro_batch_size": 4, "max_completion_length": 12, "max_length": 64, "vllm_max_model_len": 128, "lr": 1e-3,
        "beta": 0.0, "vllm_enforce_eager": "true", "report_to": "none", "reward_workers": 1, "logging_steps": 1,
    }  # fmt: skip
    return ["rlhf", *(word for name, value in (defaults | options).items() for word in (f"--{name}", value))]


def without_times(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def test_a_killed_run_continues_bit_for_bit(model, data, plugin, tmp_path):
    """Every metric that is not a time, and the final weights; two data ranks, a reference model and two engines on a place."""
    options = {"deterministic": "true", "train_iters": 5, "save_steps": 2, "nproc_per_node": 2, "beta": 0.04}
    options |= {"cpus_per_rank": 0.5, "rollout.num_engines": 2, "rollout.engines_per_device": 2}
    options |= {"lr_warmup_iters": 2, "min_lr": 1e-4}
    status, output = command.run(*grpo(model, data, plugin, tmp_path, "whole", **options), log=tmp_path / "whole.log")
    assert status == 0, output
    whole = command.metrics(tmp_path / "whole")
    assert [row["step"] for row in whole] == [1, 2, 3, 4, 5]
    assert whole[0]["rollout_train_logprob_diff"] < 1e-4
    assert [row["weight_version"] for row in whole] == [1, 2, 3, 4, 5]
    assert whole[0]["kl"] == pytest.approx(0, abs=1e-6) and whole[4]["kl"] > 1e-5

    arguments, log = grpo(model, data, plugin, tmp_path, "killed", **options), tmp_path / "killed.log"
    process = command.start(*arguments, log=log)
    command.wait_until(lambda: len(command.metrics(tmp_path / "killed")) >= 3, process, log=log)
    process.send_signal(signal.SIGKILL)
    process.wait()
    status, output = command.run(*arguments, "--resume_from_checkpoint", "auto", log=log)
    assert status == 0, output
    assert without_times(command.metrics(tmp_path / "killed")) == without_times(whole)
    weights = [load_file(tmp_path / name / "checkpoint-5" / "model.safetensors") for name in ("whole", "killed")]
    assert weights[0].keys() == weights[1].keys()
    for tensor, value in weights[0].items():
        assert value.tobytes() == weights[1][tensor].tobytes(), tensor


def test_sigterm_ends_a_run_with_its_processes(model, data, tmp_path):
    rows = [json.loads(line) for line in open(data)]
    answers = [{"role": "assistant", "content": row["solution"]} for row in rows]
    lines = [json.dumps({"messages": [*row["messages"], answer]}) + "\n" for row, answer in zip(rows, answers)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    options = f"--model {model} --dataset {tmp_path}/rows.jsonl --template_backend jinja --output_dir {tmp_path} --run_name run"
    log = tmp_path / "run.log"
    process = command.start("sft", *options.split(), "--train_iters", 100000, "--lr", 1e-3, "--report_to", "none", log=log)
    command.wait_until(lambda: len(command.metrics(tmp_path / "run")) >= 3, process, log=log)
    started = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(timeout=30) == 130
    assert "interrupted: run run has saved no checkpoint yet\n" in log.read_text()
    assert psutil.wait_procs(started, timeout=30)[1] == []


@pytest.mark.slow
def test_a_reward_worker_and_an_engine_are_replaced_and_a_dead_rank_ends_the_run(model, data, plugin, tmp_path):
    options = {"nproc_per_node": 2, "cpus_per_rank": 0.5, "rollout.num_engines": 1}
    arguments = grpo(model, data, plugin, tmp_path, "run", train_iters=100000, save_steps=5, **options)
    log, folder = tmp_path / "run.log", tmp_path / "run"
    process = command.start(*arguments, log=log)
    try:

        def steps() -> int:
            return len(command.metrics(folder))

        command.wait_until(lambda: steps() >= 5, process, log=log)
        for kind in ("RewardWorker", "RolloutEngine"):
            (victim,) = command.actors(process, kind)
            os.kill(victim, signal.SIGKILL)
            done = steps()
            command.wait_until(lambda done=done: steps() >= done + 3, process, log=log)
            assert victim not in command.actors(process, kind)
        assert command.metrics(folder)[-1]["engine_restarts"] == 1
        victim, _ = command.actors(process, "Policy")
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        status = process.wait(timeout=30)
        assert time.monotonic() - killed < 30
        assert status == 1
        assert re.search("^error: policy rank [01] died", log.read_text(), re.MULTILINE), log.read_text()[-3000:]
    finally:
        process.kill()
    done = steps()
    status, output = command.run(*arguments, "--resume_from_checkpoint", "auto", "--train_iters", done + 2, log=log)
    assert status == 0, output
    assert [row["step"] for row in command.metrics(folder)] == list(range(1, done + 3))
