"""Starts a run's engines, on the policy's places (colocate), on their own (server) or a teacher's; or takes those of an offer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from actors.group import EngineGroup, RankGroup
from actors.rollout import ENVIRONMENT, RolloutEngine
from actors.teacher_engine import TeacherEngine
from rlhf.cluster import SHARES
from rlhf.config import INFER, Config
from rlhf.counts import own_places, teacher_engines
from rlhf.named_engines import NAMESPACE, engine_name
from rlhf.rollout import RolloutEngines

if TYPE_CHECKING:
    from rlhf.cluster import Cluster


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Where an engine's actor is started; its workers are processes of the same node."""

    options: dict[str, Any]  # Ray's
    gpus: tuple[str, ...] = ()  # those of several places, of which Ray shows the actor the first alone


def build_engines(cluster: Cluster, ranks: Sequence[RankGroup] = ()) -> RolloutEngines:
    """The engines, whose `setup` waits for them.

    Where they share GPUs with `ranks`, the rank on an engine's first GPU pushes to it.
    """
    config, count = cluster.config, cluster.num_engines
    if cluster.named is not None:
        return RolloutEngines(cluster.named, num_engines=count, config=config, start=lambda engine: engine.serve.remote(config))
    width, each = config.vllm_tensor_parallel_size, config.rollout.engines_per_device
    if own_places(config):
        seats = [Seat(options=cluster.on_place(cluster.policy_ranks + index, share=1)) for index in range(count)]
    else:
        seats = _joined_seats(cluster, range(count // each * width), width, share=1 / SHARES / each)

    def spawn(index: int) -> Any:
        return _start(cluster, seats[index % len(seats)], index, load_weights=config.task in INFER, sleeps=cluster.shares_gpus)

    if not cluster.shares_gpus:
        return RolloutEngines(spawn, num_engines=count, config=config)
    rollout = RolloutEngines(
        spawn,
        num_engines=count,
        config=config,
        sender_of=lambda index: index % len(seats) * width,
        neighbours=ranks,
    )
    for group in ranks:
        group.before_work = partial(rollout.make_room, group)
    return rollout


def build_teacher_engines(cluster: Cluster, config: Config) -> RolloutEngines:
    """Engines with the weights of `config`'s model folder, on places that nobody uses yet: the teacher's own, or the policy's."""
    places = cluster.teacher_places or range(cluster.policy_ranks)
    if teacher_engines(cluster.config):
        seats = [Seat(options=cluster.on_place(place, share=1)) for place in places]
    else:
        seats = _joined_seats(cluster, places, config.vllm_tensor_parallel_size)

    def spawn(index: int) -> Any:
        return _start(cluster, seats[index], index, config=config, load_weights=True)

    return RolloutEngines(spawn, num_engines=len(seats), config=config)


def build_teacher_group(cluster: Cluster) -> EngineGroup:
    """The engines that give a teacher's logits, on places of their own; to be set up."""
    config = cluster.config
    kind = ray.remote(concurrency_groups={"report": 1})(TeacherEngine)
    engines = [cluster.create(kind, cluster.on_place(place, share=1), env=ENVIRONMENT) for place in cluster.teacher_places]
    for engine in engines:
        engine.load_libraries.remote()
    return EngineGroup("teacher", engines, timeout=config.call_timeout)


def _joined_seats(cluster: Cluster, places: range, width: int, share: float = 1 / SHARES) -> list[Seat]:
    """Seats on `width` ranks' places each, one after another, of which an engine takes a `share` of the first.

    ValueError when an engine would be on several nodes.
    """
    used = places[: len(places) // width * width]
    firsts = range(0, len(used), width)
    for part in (used[first : first + width] for first in firsts):
        nodes = {cluster.nodes[cluster.bundles[place]] for place in part}
        if len(nodes) > 1:
            raise ValueError(
                f"an engine on {width} devices must be on one node, and Ray gave the places {part[0]} to {part[-1]} on "
                f"{len(nodes)}: let its tensor parallel size divide the GPUs that a node gives"
            )
    gpus = cluster.gpus(used) if width > 1 and cluster.has_gpus else []
    return [Seat(options=cluster.on_place(used[first], share), gpus=tuple(gpus[first : first + width])) for first in firsts]


def _start(cluster: Cluster, seat: Seat, index: int, **arguments: Any) -> Any:
    kind, options = ray.remote(max_concurrency=1000)(RolloutEngine), seat.options
    if cluster.config.task == "rollout":
        options = options | {"name": engine_name(cluster.config.rollout_name, index), "namespace": NAMESPACE}
    return cluster.create(kind, options, env=ENVIRONMENT, index=index, gpus=seat.gpus, **arguments)
