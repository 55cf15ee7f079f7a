"""A run whose steps take turns with something else that is measured: what a machine does to one it does to the other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.cluster import Cluster
    from rlhf.roles import Roles

    Others = Callable[[Cluster, Roles], Callable[[], Any]]

Row = dict[str, Any]  # the metrics of a step


def run_in_turns(words: list[str], *, turn: int, others: Others) -> list[tuple[list[Row], Any]]:
    """GRPO by its command's words. What `others(cluster, roles)` returns is called after every `turn` steps.

    For each turn the metrics of its steps and the other's result, whose time does not count as the run's.
    """
    from rlhf.checkpoint import Checkpoints
    from rlhf.cluster import Cluster
    from rlhf.counts import policy_ranks, rollout_engines
    from rlhf.grpo import train_grpo
    from rlhf.metrics import METRICS, RunLog
    from rlhf.options import load_config
    from rlhf.roles import build_roles
    from rlhf.run_folder import run_folder

    config = load_config(words)
    folder, steps = run_folder(config), config.train_iters
    results: list[Any] = []

    class InTurns(RunLog):
        def step(self, step: int, *arguments: Any) -> None:
            super().step(step, *arguments)
            if step % turn == 0:
                start = time.monotonic()
                results.append(other())
                self._since += time.monotonic() - start

    with Cluster(config, policy_ranks=policy_ranks(config), num_engines=rollout_engines(config)) as cluster:
        roles = build_roles(cluster, folder)
        roles.policy.broadcast("schedule", steps)
        other = others(cluster, roles)
        log = InTurns(folder, cluster.config, total_steps=steps, timers=roles.timers(), constants=cluster.predicted)
        train_grpo(cluster.config, roles, log=log, checkpoints=Checkpoints(folder, cluster.config), start=0, total=steps)
    rows = [json.loads(line) for line in open(folder / METRICS)]
    return list(zip([rows[first : first + turn] for first in range(0, steps, turn)], results, strict=True))
