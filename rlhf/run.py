"""One run of a task: training from a checked config to the last checkpoint, or what engines do without it."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from rewards.loading import check_config as check_rewards
from rlhf.checkpoint import Checkpoint, Checkpoints, require_intact
from rlhf.config import ALL, SCORED, Config
from rlhf.counts import policy_ranks, rollout_engines, total_steps
from rlhf.data import DataFailure
from rlhf.dataset_check import check_dataset
from rlhf.devices import find_devices
from rlhf.fit import check_host, fit
from rlhf.memory import shapes
from rlhf.reporters import check_reporters
from rlhf.results import result_path
from rlhf.run_folder import run_folder, write_args
from rlhf.scoring import ScoringError
from rlhf.without_gpus import refusal_without_gpus

if TYPE_CHECKING:
    from rlhf.cluster import Cluster


def run(config: Config) -> int:
    """Carry out a task; the exit status. Everything a user can get wrong is checked before Ray starts."""
    if config.dataset:
        check_dataset(config)
    if config.task in SCORED:
        check_rewards(config)
    if config.task not in ALL:
        return on_cluster(config, _work_of(config))
    check_reporters(config.report_to)
    refuse_what_cannot_fit(config)
    if config.mcore_model is not None:
        require_intact(Path(config.mcore_model))
    folder = run_folder(config)
    checkpoints = Checkpoints(folder, config)
    resumed = checkpoints.find()
    write_args(folder, config)
    try:
        return on_cluster(config, lambda cluster: train(cluster, folder, checkpoints, resumed))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(checkpoints.left()) from None


def _work_of(config: Config) -> Callable[[Cluster], int | None]:
    """What a task that does not train does on its cluster."""
    if config.task == "rollout":
        from rlhf.offer import offer

        return offer
    results = result_path(config)
    if config.task == "eval":
        from rlhf.evaluation import evaluate

        return lambda cluster: evaluate(cluster, results)
    from rlhf.infer import infer

    return lambda cluster: infer(cluster, results)


def on_cluster(config: Config, work: Callable[[Cluster], int | None]) -> int:
    """Reserve the resources and work with them: the exit status that `work` gives, or that of its failure.

    Raises ValueError for what its user can mend; one that a library raised in an actor prints its traceback before.
    """
    import ray

    from actors.group import RankFailure
    from rlhf.cluster import Cluster
    from rlhf.error_origin import is_ours_in_actor

    try:
        with Cluster(config, policy_ranks=policy_ranks(config), num_engines=rollout_engines(config)) as cluster:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as by Ctrl-C (Ray has set a handler of its own)
            return work(cluster) or 0
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            if not is_ours_in_actor(error):
                traceback.print_exception(error)
            raise ValueError(str(error.cause)) from error
        if isinstance(error.cause, FloatingPointError):
            print(f"error: not finite: {error.cause}; lower lr, or look at the last lines of metrics.jsonl", file=sys.stderr)
            return 1
        raise
    except (RankFailure, DataFailure, ScoringError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def refuse_what_cannot_fit(config: Config) -> None:
    """ValueError when the run is for this machine and its GPUs cannot hold it, or it needs some and there are none.

    A cluster's are looked at by `Cluster`.
    """
    from rlhf.ray_start import LOCAL, cluster_address

    devices = find_devices()
    if cluster_address() != LOCAL:
        return
    models = shapes(config)
    if not devices.gpus:
        if text := refusal_without_gpus(config, models[0]):
            raise ValueError(text)
    else:
        check_host(fit(config, *models, devices.memory), *models, devices.host_memory)


def train(cluster: Cluster, folder: Path, checkpoints: Checkpoints, resumed: Checkpoint | None) -> int:
    """Build the actors, restore what is resumed, run the task's loop; the exit status."""
    from rlhf.classification import train_classification
    from rlhf.dpo import train_dpo
    from rlhf.embedding import train_embedding
    from rlhf.gkd import train_gkd
    from rlhf.grpo import train_grpo
    from rlhf.kto import train_kto
    from rlhf.metrics import RunLog
    from rlhf.reranker import train_reranker
    from rlhf.reward_model import train_reward_model
    from rlhf.roles import build_roles
    from rlhf.sft import train_sft

    loops = {
        "pt": train_sft,
        "sft": train_sft,
        "dpo": train_dpo,
        "kto": train_kto,
        "rm": train_reward_model,
        "gkd": train_gkd,
        "grpo": train_grpo,
        "seq_cls": train_classification,
        "embedding": train_embedding,
        "reranker": train_reranker,
        "generative_reranker": train_reranker,
    }
    config, roles = cluster.config, build_roles(cluster, folder)
    total = total_steps(config, roles.data.num_rows)
    roles.policy.broadcast("schedule", total)
    if roles.scorer is not None:
        roles.scorer.max_steps = total
    start = 0
    if resumed is not None:
        start = resumed.step
        if start >= total:
            print(f"{resumed.folder} is already at step {start} of {total}: nothing is left to train")
        if resumed.state["num_rows"] != roles.data.num_rows:
            raise ValueError(
                f"{resumed.folder} was saved with {resumed.state['num_rows']} rows (or packs) an epoch, the dataset now has "
                f"{roles.data.num_rows}: resume with the same dataset and packing, or start a new run: --model {resumed.folder}"
            )
        roles.data.position = resumed.state["position"]
        roles.policy.on_all("load", str(resumed.folder))
        if roles.rollout is not None:
            roles.rollout.version = resumed.state.get("weight_version", 0)  # none when it was saved without engines
        checkpoints.leave_later(resumed)
    record = RunLog(folder, config, total_steps=total, timers=roles.timers(), constants=cluster.predicted, resume=resumed)
    with closing(record) as log:
        loops[config.task](config, roles, log=log, checkpoints=checkpoints, start=start, total=total)
        checkpoints.save_last()
    return 0
