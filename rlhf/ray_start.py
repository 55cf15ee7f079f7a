"""Joining or starting Ray, on a machine that may be busy."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.services import canonicalize_bootstrap_address
from ray._private.utils import set_kill_on_parent_death_linux

ATTEMPTS = 3
NODE_SECONDS = 60.0
JOIN_ATTEMPTS = "3"  # of a second where a cluster refuses, of 40 s where it is silent; Ray's own 20 last up to 14 minutes
END_SECONDS = 10.0  # that a node gets to end in order
LOCAL = "local"  # a Ray of this run's own


def start_ray(*, address: str | None = None, **options: Any) -> str:
    """`ray.init(**options)` at `address`, or where `cluster_address` says; that address.

    Tried again when its own node did not come up in Ray's fixed 30 s. Raises ValueError when a cluster cannot be joined.
    """
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # that a token is in use
    address = address or cluster_address()
    if address != LOCAL:
        _join(address, **options)
        return address
    options.setdefault("include_dashboard", False)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            ray.init(address=address, logging_level="ERROR", **options)
            return address
        except Exception as error:  # Ray raises a bare Exception
            if attempt == ATTEMPTS or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


def cluster_address() -> str:
    """host:port of the cluster that RAY_ADDRESS, a submitted job or a `ray start` on this machine names; else LOCAL.

    Raises ValueError when RAY_ADDRESS names one that does not answer: `ray.init` would wait for it without end.
    """
    given = os.environ.get("RAY_ADDRESS") or None  # empty: not given
    if given and "://" in given:
        raise ValueError(f"RAY_ADDRESS {given} is for `ray job submit`: here give HOST:PORT of the head node, or {LOCAL}")
    if given and given not in (LOCAL, "auto") and not re.fullmatch(r".+:\d+", given):
        raise ValueError(f"RAY_ADDRESS {given} is no HOST:PORT: give that of the head node, 10.0.0.1:6379 say, auto, or {LOCAL}")
    address = canonicalize_bootstrap_address(given)
    if address is None:
        return LOCAL
    if (error := _unreachable(address)) is not None:
        if given:
            raise ValueError(f"no Ray cluster answers at RAY_ADDRESS {given}: {error}; unset it to start one here") from error
        _say_gone(address)
        return LOCAL
    return address


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """A Ray that was started on this machine for the engines it has."""

    address: str  # host:port
    devices: str | None  # CUDA_VISIBLE_DEVICES of who started it


@contextmanager
def announced(name: str, address: str) -> Iterator[None]:
    """For the length of a block, jobs on this machine find this process's Ray at `address` by the name of its engines."""
    file = _announcement(name)
    file.parent.mkdir(mode=0o700, exist_ok=True)
    file.write_text(json.dumps({"address": address, "devices": os.environ.get("CUDA_VISIBLE_DEVICES")}))
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def find_announced(name: str) -> Announcement | None:
    """The Ray that has the engines `name` and answers; None without one, or when RAY_ADDRESS decides."""
    if os.environ.get("RAY_ADDRESS"):
        return None
    try:
        found = Announcement(**json.loads(_announcement(name).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return None if _unreachable(found.address) else found


def has_other_devices(found: Announcement) -> bool:
    """Whether this process may use devices that the announced Ray does not have."""
    own = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None not in (own, found.devices) and not set(own.split(",")) & set(found.devices.split(","))


def add_node(address: str) -> subprocess.Popen:
    """A Ray node of this process's devices, in the cluster that it is connected to; it lives no longer than this process.

    RuntimeError when the node does not come.
    """
    before = len(ray.nodes())
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}", "--block"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    node = subprocess.Popen([*command, "--dashboard-agent-listen-port=0"], preexec_fn=set_kill_on_parent_death_linux, **quiet)
    end = time.monotonic() + NODE_SECONDS
    while len(ray.nodes()) == before:
        if node.poll() is not None or time.monotonic() > end:
            node.kill()
            raise RuntimeError(f"a Ray node of the devices of this terminal did not join {address}: {' '.join(command)}")
        time.sleep(0.2)
    return node


def end_process(process: subprocess.Popen, seconds: float = END_SECONDS) -> None:
    """Ask it to end, and kill it when it has not done so in time."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def within(seconds: float, function: Callable[..., Any], *arguments: Any) -> None:
    """Call `function`, and wait no longer than that: a Ray whose processes got the signal that ends this one does not answer."""
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    thread.join(seconds)


def _announcement(name: str) -> Path:
    return Path(tempfile.gettempdir(), f"megaray-{os.getuid()}", name)


@cache
def _say_gone(address: str) -> None:
    """Once, however often it is asked where to go; not on standard output, where infer's answers are."""
    text = f"the Ray cluster that `ray start` left at {address} does not answer: starting one of this run's own"
    print(text, file=sys.stderr)


def _join(address: str, **options: Any) -> None:
    if not os.environ.get("RAY_ADDRESS"):  # found on this machine; Ray uses the user's token only for what it finds itself
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        with _join_attempts():
            ray.init(address=address, logging_level="ERROR", **options)
    except ConnectionError as error:
        raise ValueError(
            f"the Ray cluster at {address} answers, but cannot be joined: {_reason(error)}; check that this is the port of its "
            "head that `ray start` named (6379, not the dashboard's 8265), that this machine is one of its nodes, and that both "
            f"have the same versions of Ray and Python and the same token; RAY_ADDRESS={LOCAL} starts a Ray of this run's own"
        ) from error


@contextmanager
def _join_attempts() -> Iterator[None]:
    """So often does Ray try to join a cluster within the block, unless the user says how often."""
    name = "RAY_gcs_server_port_wait_time_s"  # Ray makes an attempt of each second
    given = name in os.environ
    os.environ.setdefault(name, JOIN_ATTEMPTS)
    try:
        yield
    finally:
        if not given:
            del os.environ[name]


def _reason(error: ConnectionError) -> str:
    """In one line; Ray puts the traceback of its last attempt into the cause."""
    return " ".join(str(error.__cause__ or error).rpartition("ray.exceptions.")[2].split())


def _unreachable(address: str) -> OSError | None:
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        return error
    return None
