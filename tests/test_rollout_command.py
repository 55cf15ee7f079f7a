"""`megaray rollout`: engines that one job after another finds by name, trains with, and leaves behind."""

# ruff: noqa: E501 - a table of whole messages

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import command
import psutil
import pytest
import ray
from test_rollout import Sender, hugging_face, logprob_error, settings, some_prompts, start_engines
from tiny import make_tiny_model

from actors.group import ActorGroup
from rlhf.config import Config, RolloutRole
from rlhf.named_engines import NamedEngines
from rlhf.ray_start import Announcement, announced, find_announced, has_other_devices
from rlhf.rollout import RolloutEngines
from tests.model_json import TINY, write_model

OFFERED = Config(
    task="rollout",
    torch_dtype="float32",
    vllm_max_model_len=256,
    vllm_gpu_memory_utilization=0.9,
    rollout=RolloutRole(num_engines=2),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_tiny_model(folder / name, seed=seed, head_dim=32) for seed, name in enumerate("ab")}


def sender(folder: Path) -> ActorGroup:
    kind = ray.remote(concurrency_groups={"report": 1})(Sender).options(num_cpus=0)
    return ActorGroup("policy", [kind.remote(folder, group=True)], timeout=60)


def test_an_engine_serves_another_run_from_its_first_version(local_ray, models):
    first, second = sender(models["a"]), sender(models["b"])
    engines = start_engines(settings(models["a"]), 1)
    for _ in range(3):
        engines.push(first)
    prompts = some_prompts(4)
    config = settings(models["b"], max_completion_length=7, seed=5)
    again = RolloutEngines(
        lambda index: engines.engines[0], num_engines=1, config=config, start=lambda engine: engine.serve.remote(config)
    )
    with pytest.raises(RuntimeError, match="asked for weight version 0 but has no complete push"):
        list(again.generate(prompts, n=1))
    assert again.push(second).version == 1
    groups = list(again.generate(prompts, n=2))
    assert logprob_error(hugging_face(models["b"]), groups) <= 1e-4
    assert max(length for group in groups for length in group.response_lengths) == 7
    ray.kill(engines.engines[0])


@pytest.fixture
def job(tmp_path) -> Config:
    folder = write_model(tmp_path / "job", TINY)
    limits = {"torch_dtype": "float32", "vllm_max_model_len": 128}
    return Config(task="grpo", vllm_mode="server", model=str(folder), **limits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch_dtype": "bfloat16"}, "this run has torch_dtype bfloat16, the engines named e have float32: give both commands the same"),
        ({"deterministic": True}, "this run has deterministic true, the engines named e have false: give both commands the same"),
        ({"vllm_max_model_len": 300}, "prompt and response may have 300 tokens, the engines named e hold 256: give --vllm_max_model_len 256, or start them with more"),
        ({"vllm_enforce_eager": True}, "vllm_enforce_eager True: the engines named e have False; leave it out, or give it to `megaray rollout`"),
        ({"rollout": RolloutRole(num_engines=3)}, "rollout.num_engines 3: there are 2 named e"),
    ],
)  # fmt: skip
def test_a_job_that_does_not_fit_the_engines_is_refused(job, changes, message):
    named = NamedEngines("e", replace(OFFERED, model=job.model))
    with pytest.raises(ValueError) as caught:
        named.adopt(replace(job, **changes))
    assert str(caught.value) == message


def test_a_job_of_another_model_is_refused_and_one_that_fits_takes_the_engines_options(job, tmp_path):
    other = write_model(tmp_path / "other", TINY | {"hidden_size": 128})
    with pytest.raises(ValueError, match=f"{job.model} has hidden_size 64, but .* started for {other}, which has 128: start"):
        NamedEngines("e", replace(OFFERED, model=str(other))).adopt(job)
    offered = replace(OFFERED, model=str(write_model(tmp_path / "same", TINY)), vllm_max_num_seqs=8)
    adopted = NamedEngines("e", offered).adopt(job)
    assert adopted == replace(job, vllm_max_num_seqs=8, vllm_gpu_memory_utilization=0.9)


def test_an_address_is_announced_as_long_as_it_answers(monkeypatch, tmp_path):
    import socket

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert find_announced("e") is None
        with announced("e", address):
            assert find_announced("e") == Announcement(address=address, devices="4,5")
            assert find_announced("other") is None
            monkeypatch.setenv("RAY_ADDRESS", "local")
            assert find_announced("e") is None
            monkeypatch.delenv("RAY_ADDRESS")
        assert find_announced("e") is None
    with announced("e", address):
        assert find_announced("e") is None


@pytest.mark.parametrize(
    ("theirs", "ours", "other"), [("4,5", "0,1", True), ("4,5", "0,4", False), (None, "0", False), ("4", None, False)]
)
def test_a_job_brings_its_devices_when_both_terminals_have_some_of_their_own(monkeypatch, theirs, ours, other):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if ours is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ours)
    assert has_other_devices(Announcement(address="host:1", devices=theirs)) is other


ASK = """
import json, sys
import ray
from rlhf.ray_start import find_announced, start_ray
from rlhf.records import Batch
start_ray(address=find_announced("rollout").address, namespace="megaray", log_to_driver=False)
import numpy as np
engine = ray.get_actor("rollout-0", namespace="megaray")
version = ray.get(engine.version.remote())
prompts = [np.arange(first, first + 12, dtype=np.int32) for first in (10, 90, 200, 400)]
sampling = {"temperature": 0.0, "max_completion_length": 16}
(_, *tokens) = engine.generate.options(num_returns=5).remote(list(range(4)), prompts, 1, version, Batch(-1, 4), sampling)
print(json.dumps([version, [group.response_ids[0].tolist() for group in ray.get(tokens)]]))
"""


def asked(environment: dict[str, str]) -> tuple[int, list[list[int]]]:
    """The version that engine 0 holds, and its greedy responses to four prompts."""
    env = os.environ | {"PYTHONPATH": str(command.ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    version, responses = json.loads(done.stdout.strip().splitlines()[-1])
    return version, responses


def greedy(folder: Path) -> list[list[int]]:
    """What transformers answers to the same prompts."""
    import torch

    model, responses = hugging_face(folder), []
    for first in (10, 90, 200, 400):
        ids = torch.arange(first, first + 12)[None]
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        responses.append(found[0, 12:].tolist())
    return responses


@pytest.fixture
def terminals(models, tmp_path):
    """Starts commands that find each other: (environment, start a rollout, start a job)."""
    temporary = tempfile.mkdtemp(prefix="mr", dir="/tmp")  # a short path: Ray's sockets lie in it
    environment = {"TMPDIR": temporary, "RAY_ADDRESS": "", "CUDA_VISIBLE_DEVICES": "1"}
    rows = [{"messages": [{"role": "user", "content": f"what is {a}+{a}?"}]} for a in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "variety.py").write_text(
        "def variety(completions, **columns):\n    return [len(set(text)) / 10 for text in completions]\n"
    )
    started = []

    def rollout(**given) -> subprocess.Popen:
        options = {"model": models["a"], "vllm_max_model_len": 256, "vllm_enforce_eager": "true"} | given
        log = tmp_path / "rollout.log"
        started.append(command.start("rollout", *words(options), log=log, **environment))
        command.wait_until(lambda: re.search("^ready: ", log.read_text(), re.MULTILINE), started[-1], log=log)
        return started[-1]

    def train(name: str, devices: str = "1", **given) -> subprocess.Popen:
        options = {
            "rlhf_type": "grpo", "vllm_mode": "server", "model": models["a"], "dataset": tmp_path / "data.jsonl",
            "external_plugins": tmp_path / "variety.py", "reward_funcs": "variety", "template_backend": "jinja",
            "output_dir": tmp_path, "run_name": name, "num_generations": 4, "global_batch_size": 16, "micro_batch_size": 4,
            "max_completion_length": 12, "max_length": 64, "vllm_max_model_len": 128, "lr": 1e-2, "beta": 0, "save_steps": 1,
            "report_to": "none", "reward_workers": 1, "logging_steps": 1, "train_iters": 2, "call_timeout": 120,
        }  # fmt: skip
        variables = environment | {"CUDA_VISIBLE_DEVICES": devices}
        started.append(command.start("rlhf", *words(options | given), log=tmp_path / f"{name}.log", **variables))
        return started[-1]

    yield environment, rollout, train
    for process in started:
        process.kill()
    shutil.rmtree(temporary, ignore_errors=True)


def words(options: dict) -> list:
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def ends(process: subprocess.Popen, log: Path, status: int = 0, timeout: float = 200) -> str:
    assert process.wait(timeout) == status, log.read_text()[-4000:]
    return log.read_text()


@pytest.mark.slow
def test_two_jobs_train_with_the_engines_of_a_rollout_command(terminals, models, tmp_path):
    environment, rollout, train = terminals
    first = rollout()
    started = psutil.Process(first.pid).children(recursive=True)
    before = greedy(models["a"])
    cores = len(os.sched_getaffinity(0))
    for name, model, job in (("one", "a", {}), ("two", "b", {"devices": "0", "cpus_per_rank": cores})):
        output = ends(train(name, model=models[model], **job), tmp_path / f"{name}.log")  # two: more than the engine leaves
        assert "using the rollout engines named rollout of `megaray rollout`: 1" in output
        assert [row["weight_version"] for row in command.metrics(tmp_path / name)] == [1, 2]
        version, responses = asked(environment)
        assert version == 2  # pushed before the second step: the weights after the first one
        assert responses == greedy(tmp_path / name / "checkpoint-1") != before
        before = responses
    output = ends(train("wide", model=make_tiny_model(tmp_path / "wide", hidden_size=128)), tmp_path / "wide.log", status=2)
    assert "has hidden_size 128, but the engines named rollout were started for" in output
    started += psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGINT)
    assert "the rollout engines named rollout are gone" in ends(first, tmp_path / "rollout.log", timeout=60)
    assert psutil.wait_procs(started, timeout=30)[1] == []


@pytest.mark.slow
def test_a_job_trains_with_an_engine_on_two_devices(terminals, models, tmp_path):
    environment, rollout, train = terminals
    first = rollout(vllm_tensor_parallel_size=2, cpus_per_rank=0.5)
    started = psutil.Process(first.pid).children(recursive=True)
    workers = [child for child in started if child.name().startswith("VLLM::Worker")]
    assert len(workers) == 2 and {worker.ppid() for worker in workers} == set(command.actors(first, "RolloutEngine"))
    output = ends(train("one"), tmp_path / "one.log")
    assert "using the rollout engines named rollout of `megaray rollout`: 1" in output
    version, responses = asked(environment)
    assert version == 2 and responses == greedy(tmp_path / "one" / "checkpoint-1") != greedy(models["a"])
    workers[0].kill()
    notice = "rollout engine 0 died: another one has taken its place"
    command.wait_until(lambda: notice in (tmp_path / "rollout.log").read_text(), first, log=tmp_path / "rollout.log")
    started += psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGINT)
    assert "the rollout engines named rollout are gone" in ends(first, tmp_path / "rollout.log", timeout=60)
    assert psutil.wait_procs(started, timeout=30)[1] == []


@pytest.mark.slow
def test_an_engine_that_dies_is_replaced_a_second_job_refused_and_the_end_of_the_engines_ends_the_job(terminals, tmp_path):
    _, rollout, train = terminals
    first, name, log = rollout(rollout_name="mine"), {"rollout_name": "mine"}, tmp_path / "long.log"
    job = train("long", train_iters=100000, save_steps=100000, **name)

    def steps() -> int:
        return len(command.metrics(tmp_path / "long"))

    command.wait_until(lambda: steps() >= 2, job, log=log)
    output = ends(train("other", **name), tmp_path / "other.log", status=2)
    assert "the rollout engines named mine serve another job" in output
    (victim,) = command.actors(first, "RolloutEngine")
    os.kill(victim, signal.SIGKILL)
    done = steps()
    command.wait_until(lambda: steps() >= done + 3, job, log=log)
    assert command.metrics(tmp_path / "long")[-1]["engine_restarts"] == 1
    assert "rollout engine 0 died: another one has taken its place" in (tmp_path / "rollout.log").read_text()
    first.send_signal(signal.SIGINT)
    output = ends(job, log, status=1, timeout=60)
    assert re.search("^error: the rollout engines named mine are gone: `megaray rollout` has ended", output, re.MULTILINE), output
    ends(first, tmp_path / "rollout.log", timeout=60)
