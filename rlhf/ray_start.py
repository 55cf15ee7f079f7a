"""Starting Ray, on a machine that may be busy."""

from __future__ import annotations

import logging
from typing import Any

import ray

ATTEMPTS = 3


def start_ray(**options: Any) -> None:
    """`ray.init(**options)`, tried again when its node did not come up in Ray's fixed 30 s."""
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # that a token is in use
    for attempt in range(1, ATTEMPTS + 1):
        try:
            ray.init(logging_level="ERROR", **options)
            return
        except Exception as error:  # Ray raises a bare Exception
            if attempt == ATTEMPTS or "timed out during startup" not in str(error):
                raise
            ray.shutdown()
