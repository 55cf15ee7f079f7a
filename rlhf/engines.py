"""Starts a run's rollout engines: on the policy's places (colocate), on their own (server); or takes those of an offer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from actors.group import RankGroup
from actors.rollout import ENVIRONMENT, RolloutEngine
from rlhf.config import INFER, Config
from rlhf.counts import own_places
from rlhf.named_engines import NAMESPACE, engine_name
from rlhf.rollout import RolloutEngines

if TYPE_CHECKING:
    from rlhf.cluster import Cluster


def build_engines(cluster: Cluster, ranks: Sequence[RankGroup] = ()) -> RolloutEngines:
    """The engines, whose `setup` waits for them. Where they share GPUs with `ranks`, each rank pushes to those on its own GPU."""
    config = cluster.config
    if cluster.named is not None:
        return RolloutEngines(
            cluster.named, num_engines=cluster.num_engines, config=config, start=lambda engine: engine.serve.remote(config)
        )
    spawn = partial(_start_engine, cluster)
    if not cluster.shares_gpus:
        return RolloutEngines(spawn, num_engines=cluster.num_engines, config=config)
    width = config.vllm_tensor_parallel_size
    rollout = RolloutEngines(
        spawn,
        num_engines=cluster.num_engines,
        config=config,
        sender_of=lambda index: index * width,
        neighbours=ranks,
    )
    for group in ranks:
        group.before_work = partial(rollout.make_room, group)
    return rollout


def build_teacher_engines(cluster: Cluster, config: Config) -> RolloutEngines:
    """Engines with the weights of `config`'s model folder, on the places of ranks that do not use them yet."""

    def start(index: int) -> Any:
        place = cluster.on_place(index)
        return cluster.create(_kind(), place, config=config, env=ENVIRONMENT, index=index, load_weights=True)

    return RolloutEngines(start, num_engines=cluster.policy_ranks, config=config)


def _start_engine(cluster: Cluster, index: int) -> Any:
    config = cluster.config
    first = index * config.vllm_tensor_parallel_size
    options = cluster.on_place(first + cluster.policy_ranks, share=1) if own_places(config) else cluster.on_place(first)
    if config.task == "rollout":
        options |= {"name": engine_name(config.rollout_name, index), "namespace": NAMESPACE}
    loads = config.task in INFER
    return cluster.create(_kind(), options, env=ENVIRONMENT, index=index, load_weights=loads, sleeps=cluster.shares_gpus)


def _kind() -> Any:
    return ray.remote(max_concurrency=1000)(RolloutEngine)
