"""One run, from a checked config to the last checkpoint."""

from __future__ import annotations

import sys
from contextlib import closing
from math import ceil
from typing import TYPE_CHECKING

from rewards.loading import check as check_rewards
from rlhf.checkpoint import Checkpoints, run_folder
from rlhf.config import Config
from rlhf.dataset_check import check_dataset
from rlhf.validation import policy_ranks, rollout_engines

if TYPE_CHECKING:
    from rlhf.cluster import Cluster


def run(config: Config) -> int:
    """Train; the exit status. Everything a user can get wrong is checked before Ray starts."""
    check_dataset(config)
    if config.task == "rlhf":
        check_rewards(config.reward_funcs, config.external_plugins)
    import ray

    from actors.group import RankFailure
    from rlhf.cluster import Cluster

    try:
        with Cluster(config, policy_ranks=policy_ranks(config), num_engines=rollout_engines(config)) as cluster:
            train(config, cluster)
    except RankFailure as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ValueError(str(error.cause)) from error
        raise
    return 0


def train(config: Config, cluster: Cluster) -> None:
    """Build the actors, resume if asked, run the task's loop."""
    from rlhf.grpo import train_grpo
    from rlhf.metrics import RunLog
    from rlhf.sft import train_sft

    folder = run_folder(config)
    checkpoints = Checkpoints(folder, config)
    resumed = checkpoints.find()
    roles = cluster.build()
    total = total_steps(config, roles.data.num_rows)
    roles.policy.broadcast("schedule", total)
    start = 0
    if resumed is not None:
        start = resumed.step
        roles.data.position = resumed.state["position"]
        roles.policy.broadcast("load", str(resumed.folder))
        if roles.rollout is not None:
            roles.rollout.version = resumed.state["weight_version"] - 1  # the first push brings it back
    with closing(RunLog(folder, config, total_steps=total, timers=roles.timers(), resume=resumed)) as log:
        loop = train_sft if config.task == "sft" else train_grpo
        loop(config, roles, log=log, checkpoints=checkpoints, start=start, total=total)
        checkpoints.save_last()


def total_steps(config: Config, num_rows: int) -> int:
    """Optimizer steps of the run: num_train_epochs over the dataset, or train_iters."""
    if config.num_train_epochs is None:
        return config.train_iters
    if config.task == "sft":
        return ceil(config.num_train_epochs * num_rows / config.global_batch_size)
    prompts = config.generation_batch_size // config.num_generations
    return ceil(config.num_train_epochs * num_rows / prompts) * config.steps_per_generation * config.num_iterations
