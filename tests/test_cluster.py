"""A Ray cluster of two nodes on this machine, a job submitted to it: policy and rollout engine on different nodes."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from command import ROOT, metrics
from tiny import make_tiny_model

from rlhf.cluster import by_node, part

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def folders():
    """A short path: Ray has sockets below it."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def cluster(tmp_path, folders):
    """(environment to reach it, dashboard address) of a head and a worker node with one CPU each."""
    port, dashboard = free_port(), free_port()
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = os.environ | token | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    environment.pop("RAY_ADDRESS", None)
    common = ["--num-cpus=1", "--block", "--disable-usage-stats"]
    head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", "--include-dashboard=true", *common]
    address = f"http://127.0.0.1:{dashboard}"
    nodes = []
    try:
        for name, arguments in (("head", head), ("worker", [f"--address=127.0.0.1:{port}", *common])):
            log = open(tmp_path / f"{name}.log", "w")
            own = [f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={folders / name}"]  # a job's files too
            command = [BIN / "ray", "start", *arguments, *own]
            nodes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            deadline = time.monotonic() + 120
            while len(listed("nodes", environment, address)) < len(nodes):
                assert time.monotonic() < deadline, (tmp_path / f"{name}.log").read_text()
                time.sleep(1)
        yield environment, address
    finally:
        for node in reversed(nodes):  # `ray start --block` takes its node's processes with it
            node.terminate()
            node.wait(60)


def listed(kind: str, environment: dict[str, str], dashboard: str) -> list[dict]:
    """The cluster's living nodes or actors."""
    command = [BIN / "ray", "list", kind, "--address", dashboard, "--filter", "state=ALIVE", "--format", "json"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True)
    return json.loads(answer.stdout) if answer.stdout.startswith("[") else []  # else: a sentence that says why


def submit(options: str, environment: dict[str, str], dashboard: str, log: Path) -> subprocess.Popen:
    """A running `ray job submit`; a head that has just started may not have an agent for the job yet."""
    command = [BIN / "ray", "job", "submit", "--address", dashboard, "--working-dir", ".", "--", "python", "rlhf/main.py"]
    deadline = time.monotonic() + 120
    while True:
        assert time.monotonic() < deadline, log.read_text()
        with open(log, "w") as output:
            job = subprocess.Popen([*command, *shlex.split(options)], cwd=ROOT, env=environment, stdout=output, stderr=output)
        while job.poll() is None and "Tailing logs" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.5)
        if job.poll() is None or "No available agent" not in log.read_text():
            return job


def test_the_parts_of_a_place_are_never_more_than_it():
    for size in (1, 2, 5, 8, 0.5):
        for count in range(1, 13):
            whole = round(part(size, 1 / count) * 10_000) * count
            assert size * 10_000 - count < whole <= size * 10_000


def test_ranks_that_follow_each_other_sit_on_one_node():
    assert by_node({0: "b", 1: "a", 2: "b", 3: "a", 4: "b"}) == [0, 2, 4, 1, 3]


@pytest.mark.slow
def test_a_submitted_job_puts_policy_and_rollout_on_different_nodes(cluster, tmp_path):
    environment, dashboard = cluster
    model = make_tiny_model(tmp_path / "model", head_dim=32)
    rows = [{"messages": [{"role": "user", "content": f"{a}+{a}="}], "solution": str(2 * a)} for a in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = "def variety(completions, **columns):\n    return [len(set(text)) / 9 for text in completions]\n"
    (tmp_path / "variety.py").write_text(reward)
    options = (
        f"rlhf --rlhf_type grpo --model {model} --dataset {tmp_path}/data.jsonl --external_plugins {tmp_path}/variety.py "
        f"--reward_funcs variety --template_backend jinja --output_dir {tmp_path}/runs --run_name job --vllm_mode server "
        "--num_generations 4 --global_batch_size 16 --micro_batch_size 4 --max_completion_length 12 --max_length 64 "
        "--vllm_max_model_len 128 --vllm_enforce_eager true --beta 0 --lr 1e-3 --train_iters 30 --report_to none"
    )
    job = submit(options, environment, dashboard, tmp_path / "submit.log")
    places: dict[str, str] = {}
    while job.poll() is None:
        if metrics(tmp_path / "runs" / "job"):
            places |= {actor["class_name"]: actor["node_id"] for actor in listed("actors", environment, dashboard)}
        time.sleep(1)
    assert job.returncode == 0, (tmp_path / "submit.log").read_text()[-4000:]
    assert len(metrics(tmp_path / "runs" / "job")) == 30
    assert places["Policy"] != places["RolloutEngine"], places
    assert (tmp_path / "runs" / "job" / "checkpoint-30" / "model.safetensors").exists()
