"""Joining or starting Ray, on a machine that may be busy."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

import ray
from ray._private.services import canonicalize_bootstrap_address

ATTEMPTS = 3
LOCAL = "local"  # a Ray of this run's own


def start_ray(*, address: str | None = None, **options: Any) -> None:
    """`ray.init(**options)` at `address`, or where `cluster_address` says.

    Tried again when its own node did not come up in Ray's fixed 30 s.
    """
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # that a token is in use
    address = address or cluster_address()
    if address == LOCAL:
        options.setdefault("include_dashboard", False)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            ray.init(address=address, logging_level="ERROR", **options)
            return
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
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        if given:
            raise ValueError(f"no Ray cluster answers at RAY_ADDRESS {given}: {error}; unset it to start one here") from error
        print(f"the Ray cluster that `ray start` left at {address} does not answer: starting one of this run's own")
        return LOCAL
    return address
