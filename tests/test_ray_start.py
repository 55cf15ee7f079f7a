"""Which cluster a run joins."""

import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from rlhf import ray_start
from rlhf.ray_start import LOCAL, cluster_address, end_process


@pytest.fixture
def left_behind(monkeypatch):
    """Sets the address that a `ray start` wrote down on this machine."""

    def leave(address):
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(ray_start, "canonicalize_bootstrap_address", lambda given: given or address)

    return leave


@pytest.fixture
def listening():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def silent():
    with socket.socket() as bound:  # bound, so that nobody else listens there
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def test_a_cluster_that_answers_is_joined(left_behind, listening):
    left_behind(listening)
    assert cluster_address() == listening


def test_a_cluster_that_is_gone_is_not_waited_for(left_behind, silent, capsys):
    left_behind(silent)
    assert cluster_address() == cluster_address() == LOCAL
    assert capsys.readouterr().err.count(silent) == 1


def test_without_a_cluster_a_run_starts_its_own(left_behind, monkeypatch):
    left_behind(None)
    assert cluster_address() == LOCAL
    monkeypatch.undo()
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert cluster_address() == LOCAL


def test_an_address_that_does_not_answer_is_refused(monkeypatch, silent):
    monkeypatch.setenv("RAY_ADDRESS", silent)
    with pytest.raises(ValueError, match=f"RAY_ADDRESS {silent}.*unset it"):
        cluster_address()


@pytest.mark.parametrize("address", ["10.0.0.1", "10.0.0.1:head", "head"])
def test_an_address_without_a_port_is_refused(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=f"^RAY_ADDRESS {address} is no HOST:PORT"):
        cluster_address()


def test_the_address_of_a_dashboard_is_refused(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(ValueError, match="ray job submit"):
        cluster_address()


JOIN = """
import os
from rlhf.ray_start import start_ray
before = dict(os.environ)
try:
    start_ray(namespace="test", log_to_driver=False)
except ValueError as error:
    print(error)
assert dict(os.environ) == before
"""


def test_a_cluster_that_answers_and_cannot_be_joined_is_an_error_of_one_line():
    """In a process of its own: this one may have a Ray already."""
    server = grpc.server(ThreadPoolExecutor(1))  # speaks what Ray speaks, and knows none of its calls
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    environment = os.environ | {"RAY_ADDRESS": f"127.0.0.1:{port}", "PYTHONPATH": str(Path(__file__).parents[1])}
    try:
        output = subprocess.run(
            [sys.executable, "-c", JOIN], env=environment, capture_output=True, text=True, timeout=60, check=True
        ).stdout
    finally:
        server.stop(None)
    text = rf"the Ray cluster at [\d.]+:{port} answers, but cannot be joined: RpcError: RPC error: Method not found!; check that "
    assert re.match(text, output) and output.count("\n") == 1


@pytest.mark.parametrize(("disposition", "ended_by"), [("SIG_DFL", signal.SIGTERM), ("SIG_IGN", signal.SIGKILL)])
def test_a_process_that_does_not_end_when_asked_is_killed(disposition, ended_by):
    code = f"import signal, time; signal.signal(signal.SIGTERM, signal.{disposition}); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.read(1)  # it has come so far
        end_process(process, seconds=1)
    assert process.returncode == -ended_by
