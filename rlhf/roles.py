"""Builds what a task works with on a cluster's places: the policy's ranks, frozen models, engines, data, rewards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors import exporter
from actors.data import DataWorker
from actors.exporter import Exporter
from actors.frozen import Frozen
from actors.group import ActorGroup, EngineGroup, RankGroup
from actors.hugging_face import HuggingFaceModel
from actors.policy import Policy
from actors.prompts import PromptEncoder
from actors.reward import RewardWorker
from rlhf.config import RolloutRole
from rlhf.counts import frozen_group, frozen_ranks, samples, teacher_devices, teacher_engines, total_steps
from rlhf.data import PromptedRowStream, PromptStream, RowStream
from rlhf.engines import build_engines, build_teacher_engines, build_teacher_group
from rlhf.fit import MOST
from rlhf.model_folder import excess_ids
from rlhf.model_reward import ModelReward
from rlhf.named_engines import NAMESPACE, job_name
from rlhf.rollout import RolloutEngines
from rlhf.scoring import Scorer
from rlhf.teacher_responses import complete_responses

if TYPE_CHECKING:
    from rlhf.cluster import Cluster

SETUP = "the data worker's setup (--dataset_num_proc: more processes for it)"
TEACHER_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "max_completion_length", "stop_words")  # of seq_kd


@dataclass(kw_only=True)
class Roles:
    """What a loop works with. A role that the task does not need is None."""

    policy: RankGroup
    data: PromptStream | RowStream
    reference: RankGroup | None = None
    teacher: RankGroup | EngineGroup | None = None
    rollout: RolloutEngines | None = None
    scorer: Scorer | None = None

    def timers(self) -> list[Any]:
        """The roles that measure how long they are waited for."""
        return [role for role in (self.policy, self.reference, self.teacher, self.rollout, self.scorer) if role is not None]


@dataclass(kw_only=True)
class InferenceRoles:
    """What infer and eval work with."""

    rollout: RolloutEngines
    data: PromptStream | None = None  # of a dataset
    encoder: Any | None = None  # handle of a PromptEncoder, without one
    scorer: Scorer | None = None


def build_roles(cluster: Cluster, folder: Path) -> Roles:
    """Create every actor of a training task and wait until all are ready. They start side by side.

    With `seq_kd` engines answer the prompts first, by the teacher: `folder` is the run's.
    """
    config = cluster.config
    data_worker = _data_worker(cluster)
    dataset = data_worker.setup.remote()
    if config.seq_kd:
        _answer_by_teacher(cluster, data_worker, dataset, folder)
    policy = _rank_group(cluster, "policy", Policy)
    frozen = _frozen_ranks(cluster)
    reward_model = rollout = scorer = None
    if config.reward_model is not None:
        reward_model = _rank_group(cluster, "reward model", Frozen, role="reward_model")
    if config.task == "grpo":
        scorer = _scorer(cluster)
    sharing = [] if cluster.teacher_places else frozen.values()
    groups = [ranks for ranks in (policy, *sharing, reward_model) if ranks is not None]
    if teacher_engines(config):
        frozen["teacher"] = build_teacher_group(cluster)
    if samples(config):
        rollout = build_engines(cluster, groups)
    for ranks in dict.fromkeys([*groups, *frozen.values()]):
        ranks.setup()
    if reward_model is not None:
        scorer.model = ModelReward(reward_model, data_worker, config)
    info = cluster.answer(dataset, SETUP)
    print(info.describe())
    if rollout is not None:
        rollout.setup()
        rollout.stop_words += info.end_tokens
    if scorer is not None:
        scorer.wait_until_ready()
    stream = PromptStream if scorer is not None else PromptedRowStream if rollout is not None else RowStream
    data = stream(
        data_worker,
        num_rows=info.num_rows,
        timeout=config.call_timeout,
        ahead=config.dataloader_num_workers > 0,
        evaluation_rows=info.evaluation_rows,
    )
    return Roles(policy=policy, data=data, rollout=rollout, scorer=scorer, **frozen)


def build_inference(cluster: Cluster) -> InferenceRoles:
    """Create what infer or eval needs, and wait until it is ready: engines with the model's own weights."""
    config = cluster.config
    reader = _data_worker(cluster) if config.dataset else cluster.create(ray.remote(PromptEncoder), {"num_cpus": 0})
    setup = reader.setup.remote()
    scorer = _scorer(cluster) if config.task == "eval" else None
    roles = InferenceRoles(rollout=build_engines(cluster), scorer=scorer)
    info = cluster.answer(setup, SETUP if config.dataset else "the setup of the prompt encoder")
    roles.rollout.setup()
    if not config.dataset:
        roles.encoder = reader
        roles.rollout.stop_words += info
        return roles
    print(info.describe())
    roles.rollout.stop_words += info.end_tokens
    roles.data = PromptStream(reader, num_rows=info.num_rows, timeout=config.call_timeout, ahead=False)
    return roles


def build_exporter(cluster: Cluster) -> RankGroup:
    """The ranks of a conversion, with the model that they read."""
    group = _rank_group(cluster, "exporter", Exporter, env=exporter.ENVIRONMENT)
    group.setup()
    return group


def build_hugging_face(cluster: Cluster) -> ActorGroup:
    """One process for models in transformers, on the driver's node."""
    actor = cluster.create(_reporting(HuggingFaceModel), cluster.beside_driver())
    return ActorGroup("transformers", [actor], timeout=cluster.config.call_timeout)


def _rank_group(
    cluster: Cluster,
    name: str,
    kind: type,
    places: range | None = None,
    *,
    env: dict[str, str] | None = None,
    **arguments: Any,
) -> RankGroup:
    """A rank on each of these places (default: the policy's)."""
    places = places or range(cluster.policy_ranks)
    ranks = [
        cluster.create(_reporting(kind), cluster.on_place(place), env=env, rank=rank, world_size=len(places), **arguments)
        for rank, place in enumerate(places)
    ]
    for rank in ranks:  # groups are set up one after another
        rank.load_libraries.remote()
    return RankGroup(name, ranks, timeout=cluster.config.call_timeout)


def _frozen_ranks(cluster: Cluster) -> dict[str, RankGroup]:
    """The group of the reference or teacher that the task has beside the policy, by its role."""
    name = frozen_group(cluster.config)
    if name is None:
        return {}
    places = cluster.teacher_places or range(frozen_ranks(cluster.config))
    return {name: _rank_group(cluster, name, Frozen, places, role=name)}


def _answer_by_teacher(cluster: Cluster, data_worker: Any, dataset: ray.ObjectRef, folder: Path) -> None:
    """Sample the teacher's responses on the places that its ranks or engines get afterwards; `dataset`: its `DatasetInfo`."""
    width = 1 if cluster.named else cluster.config.vllm_tensor_parallel_size  # an offer's width is that of its own devices
    if cluster.teacher_places:
        width = teacher_devices(cluster.config)
    changes = {"model": cluster.config.teacher.model, "vllm_tensor_parallel_size": width, "rollout": RolloutRole()}
    config = replace(cluster.config, vllm_gpu_memory_utilization=MOST / 100, **changes)
    engines = build_teacher_engines(cluster, config)
    info = cluster.answer(dataset, SETUP)
    count = min(info.num_rows, total_steps(config, info.num_rows) * config.global_batch_size)
    engines.stop_words += info.end_tokens
    prompts = PromptStream(data_worker, num_rows=info.num_rows, timeout=config.call_timeout)
    excess = excess_ids(config.model, cluster.config.model)
    generate = partial(engines.generate, sampling={"excluded_ids": excess})
    way = {"teacher.model": str(Path(config.model).resolve())}
    way |= {name: getattr(config, name) for name in TEACHER_SAMPLING}
    responses = complete_responses(folder, prompts.batch_at, generate, count=count, way=way)
    cluster.answer(data_worker.adopt.remote(responses), "adopting the teacher's responses")
    for engine in engines.engines:
        ray.kill(engine)


def _scorer(cluster: Cluster) -> Scorer:
    scorer = Scorer(lambda index: cluster.create(ray.remote(RewardWorker), {"num_cpus": 0}), cluster.config)
    cluster.before_release.append(scorer.close)
    return scorer


def _data_worker(cluster: Cluster) -> Any:
    """On the driver's node, where the dataset files are. Its name says that named engines are taken."""
    name = {"name": job_name(cluster.named.name), "namespace": NAMESPACE} if cluster.named else {}
    return cluster.create(_reporting(DataWorker), cluster.beside_driver() | name)


def _reporting(kind: type) -> Any:
    """The Ray class of an actor that says what it is doing while it works."""
    return ray.remote(concurrency_groups={"report": 1})(kind)
