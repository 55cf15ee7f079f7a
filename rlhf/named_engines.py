"""Engines that `megaray rollout` offers to one job after another: found on a Ray cluster by their name, checked, shared out.

The command owns the engines and their placement group, which has their name; when an engine dies, the command starts
another one. A job takes the engines by its data worker, which carries a name that only one job at a time can have.
"""

from __future__ import annotations

import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import get_placement_group, placement_group_table

from actors.group import RankFailure
from rlhf.config import Config
from rlhf.model_folder import read_shape

NAMESPACE = "megaray"
REPLACED_WITHIN = 60.0  # seconds until an engine that died must have a successor
OFFER_TIMEOUT = 30.0  # seconds
ENGINE_OPTIONS = (  # decided where engines are started
    "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "vllm_max_num_seqs", "vllm_enforce_eager",
    "vllm_enable_prefix_caching", "vllm",
)  # fmt: skip


class NamedEngines:
    """The engines called `name`, as a job sees them: a function that gives the living engine of a place."""

    def __init__(self, name: str, offered: Config):
        self.name, self.offered = name, offered
        self.given: dict[int, Any] = {}  # the last engine of each place

    @property
    def count(self) -> int:
        """Engines."""
        return self.offered.rollout.num_engines

    def __call__(self, index: int) -> Any:
        """The engine in a place; once it was given, the one that follows it. RankFailure when none does."""
        end = time.monotonic() + REPLACED_WITHIN
        while (engine := _actor(engine_name(self.name, index))) is None or engine == self.given.get(index):
            if not is_offered(self.name):
                raise RankFailure(
                    f"the rollout engines named {self.name} are gone: `megaray rollout` has ended. Start it again, then this run "
                    "with --resume_from_checkpoint auto"
                )
            if time.monotonic() > end:
                raise RankFailure(f"engine {index} of those named {self.name} died, no other came in {REPLACED_WITHIN:.0f} s")
            time.sleep(0.2)
        self.given[index] = engine
        return engine

    def adopt(self, config: Config) -> Config:
        """`config` with the engines' own options. ValueError when the engines do not fit the run."""
        own, default = self.offered, Config()
        for name in ENGINE_OPTIONS:
            given = getattr(config, name)
            if given not in (getattr(default, name), getattr(own, name)):
                raise ValueError(
                    f"{name} {given}: the engines named {self.name} have {getattr(own, name)}; leave it out, or give it to "
                    "`megaray rollout`"
                )
        if config.rollout.num_engines not in (None, self.count):
            raise ValueError(f"rollout.num_engines {config.rollout.num_engines}: there are {self.count} named {self.name}")
        self._check_model(config)
        for name in ("torch_dtype", "deterministic"):
            ours, theirs = getattr(config, name), getattr(own, name)
            if ours != theirs:
                raise ValueError(
                    f"this run has {name} {_word(ours)}, the engines named {self.name} have {_word(theirs)}: give both commands "
                    "the same"
                )
        limit = own.vllm_max_model_len
        if limit and config.vllm_max_model_len and config.vllm_max_model_len > limit:
            raise ValueError(
                f"prompt and response may have {config.vllm_max_model_len} tokens, the engines named {self.name} hold {limit}: "
                f"give --vllm_max_model_len {limit}, or start them with more"
            )
        return replace(config, **{name: getattr(own, name) for name in ENGINE_OPTIONS})

    def _check_model(self, config: Config) -> None:
        ours = read_shape(Path(config.model))
        try:
            theirs = read_shape(Path(self.offered.model))
        except ValueError:
            return  # on another machine: a push checks every tensor's name and shape
        for item in fields(ours):
            mine, other = getattr(ours, item.name), getattr(theirs, item.name)
            if item.name not in ("max_length", "dtype") and mine != other:
                raise ValueError(
                    f"{config.model} has {item.name} {mine}, but the engines named {self.name} were started for "
                    f"{self.offered.model}, which has {other}: start `megaray rollout` with this model, or with another "
                    "--rollout_name"
                )


def find_engines(name: str) -> NamedEngines | None:
    """The engines of that name on the cluster; None when there are none. ValueError when a job uses them, or all are dead."""
    if not is_offered(name):
        return None
    if is_taken(name):
        raise ValueError(f"the rollout engines named {name} serve another job: wait for its end, or use another --rollout_name")
    for index in range(get_placement_group(name).bundle_count):
        engine = _actor(engine_name(name, index))
        try:
            if engine is not None:
                return NamedEngines(name, ray.get(engine.offer.remote(), timeout=OFFER_TIMEOUT))
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            continue
    raise ValueError(f"none of the rollout engines named {name} answers: look at `megaray rollout`, or end it")


def is_offered(name: str) -> bool:
    """Whether a `megaray rollout` offers engines of that name on the cluster."""
    try:
        return placement_group_table(get_placement_group(name))["state"] != "REMOVED"
    except ValueError:
        return False


def is_taken(name: str) -> bool:
    """Whether a job uses the engines of that name."""
    return _actor(job_name(name)) is not None


def engine_name(name: str, index: int) -> str:
    return f"{name}-{index}"


def job_name(name: str) -> str:
    return f"{name}-job"


def _actor(name: str) -> Any | None:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
