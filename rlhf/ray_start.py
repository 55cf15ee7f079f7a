"""Joining or starting Ray, on a machine that may be busy."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.services import canonicalize_bootstrap_address

ATTEMPTS = 3
LOCAL = "local"  # a Ray of this run's own


def start_ray(*, address: str | None = None, **options: Any) -> str:
    """`ray.init(**options)` at `address`, or where `cluster_address` says; that address.

    Tried again when its own node did not come up in Ray's fixed 30 s.
    """
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # that a token is in use
    address = address or cluster_address()
    if address == LOCAL:
        options.setdefault("include_dashboard", False)
    elif not os.environ.get("RAY_ADDRESS"):  # found on this machine: it has this user's token, which Ray uses when left to find it
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
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
    given = os.environ.get("RAY_ADDRESS")
    if given and "://" in given:
        raise ValueError(f"RAY_ADDRESS {given} is for `ray job submit`: here give HOST:PORT of the head node, or {LOCAL}")
    address = canonicalize_bootstrap_address(given)
    if address is None:
        return LOCAL
    if (error := _unreachable(address)) is not None:
        if given:
            raise ValueError(f"no Ray cluster answers at RAY_ADDRESS {given}: {error}; unset it to start one here") from error
        print(f"the Ray cluster that `ray start` left at {address} does not answer: starting one of this run's own")
        return LOCAL
    return address


@contextmanager
def announced(name: str, address: str) -> Iterator[None]:
    """For the length of a block, jobs on this machine find the Ray at `address` by the name of the engines on it."""
    file = _announcement(name)
    file.parent.mkdir(mode=0o700, exist_ok=True)
    file.write_text(address)
    try:
        yield
    finally:
        if announced_address(name) in (None, address):
            file.unlink(missing_ok=True)


def announced_address(name: str) -> str | None:
    """host:port of the Ray that has the engines `name` and answers; None without one, or when RAY_ADDRESS decides."""
    if os.environ.get("RAY_ADDRESS"):
        return None
    try:
        address = _announcement(name).read_text()
    except OSError:
        return None
    return None if _unreachable(address) else address


def _announcement(name: str) -> Path:
    return Path(tempfile.gettempdir(), f"megaray-{os.getuid()}", name)


def _unreachable(address: str) -> OSError | None:
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        return error
    return None
