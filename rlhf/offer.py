"""`megaray rollout`: keeps named rollout engines on a Ray cluster for training jobs, until it is interrupted."""

from __future__ import annotations

import shlex
import time
from contextlib import nullcontext

import ray

from rlhf.cluster import Cluster
from rlhf.config import Config
from rlhf.engines import build_engines
from rlhf.named_engines import is_taken
from rlhf.ray_start import LOCAL, announced, within

WATCH_SECONDS = 1.0  # between two looks at the engines
JOB_ENDS_WITHIN = 30.0  # seconds that a job gets to notice that its engines are gone


def offer(cluster: Cluster) -> None:
    """Start the engines, say how to use them, replace those that die; returns when interrupted."""
    config = cluster.config
    address = ray.get_runtime_context().gcs_address
    try:
        engines = build_engines(cluster)
        engines.setup()
        with announced(config.rollout_name, address) if cluster.address == LOCAL else nullcontext():
            print(ready(config, address, own_ray=cluster.address == LOCAL), flush=True)
            while True:
                time.sleep(WATCH_SECONDS)
                for index in engines.mend():
                    print(f"rollout engine {index} died: another one has taken its place", flush=True)
    except KeyboardInterrupt:
        cluster.release()
        within(JOB_ENDS_WITHIN, wait_for_job, config.rollout_name)
        print(f"the rollout engines named {config.rollout_name} are gone")


def wait_for_job(name: str) -> None:
    """Until no job uses the engines: one that does still needs this Ray, to end in order."""
    while is_taken(name):
        time.sleep(0.2)


def ready(config: Config, address: str, *, own_ray: bool) -> str:
    """What is there, and how a job uses it."""
    count, name = config.rollout.num_engines, config.rollout_name
    engines = "1 rollout engine" if count == 1 else f"{count} rollout engines"
    choice = f" --rollout_name {shlex.quote(name)}" if name != Config().rollout_name else ""
    where = "on this machine" if own_ray else f"on the Ray cluster at {address}"
    return (
        f"ready: {engines} named {name} for {config.model} ({config.torch_dtype}, {config.vllm_max_model_len} tokens). A job\n"
        f"  megaray rlhf --rlhf_type grpo --vllm_mode server{choice} ...\n{where} uses them, one job at a time. Ctrl-C ends them."
    )
