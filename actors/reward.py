"""A CPU process that runs reward functions and may be killed at any moment.

Methods run in the process's main thread, one at a time: math-verify's own deadline works there only, so this actor has
no concurrency groups and has no `report`; whoever calls it sets a deadline and kills it.
"""

from __future__ import annotations

import resource
from typing import Any

from rewards.calling import Failure, Outcome, Request, RewardFunction, reward_columns
from rewards.loading import load
from rlhf.records import GroupTokens


class RewardWorker:
    """Holds the reward functions of a run."""

    def __init__(self, config: Any):
        self.config = config
        self.functions: dict[str, RewardFunction] = {}

    def setup(self) -> set[str]:
        """Import the reward functions; then limit the memory they may take beyond that to `reward_memory` GiB.

        Returns the names of those that may look at token ids.
        """
        self.functions = load(self.config)
        limit = _data_bytes() + int(self.config.reward_memory * 2**30)
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
        return {name for name, function in self.functions.items() if function.takes_token_ids}

    def ping(self) -> None:
        """Answer, if this process lives."""

    def score(self, request: Request, tokens: GroupTokens | None) -> tuple[Outcome, ...] | Failure:
        """An outcome for each completion of `request`; a failure of the function is returned, not raised."""
        return self.functions[request.function].score(list(request.texts), reward_columns(request, tokens))


def _data_bytes() -> int:
    """What this process holds now of the memory that RLIMIT_DATA counts."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
