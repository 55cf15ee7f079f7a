"""Starts Ray, reserves its resources, and builds the actor groups: the one file of the controller that knows the actors.

A policy rank and, in colocate mode, the engines sit on one placement bundle a rank; frozen models (reference, teacher, reward
model) share the policy's bundles. In server mode each engine has bundles of its own. The data and reward actors take no bundle.
"""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from actors import exporter as exporter_actor
from actors import rollout as rollout_actor
from actors.data import DatasetInfo, DataWorker
from actors.exporter import Exporter
from actors.frozen import Frozen
from actors.group import ActorGroup, RankGroup
from actors.hugging_face import HuggingFaceModel
from actors.policy import Policy
from actors.prompts import PromptEncoder
from actors.reward import RewardWorker
from actors.rollout import RolloutEngine
from rlhf.config import INFER, Config
from rlhf.counts import frozen_group, own_places, samples, total_steps
from rlhf.data import DataFailure, PromptedRowStream, PromptStream, RowStream
from rlhf.devices import find_devices
from rlhf.fit import MOST, check_host, fit, note, warning
from rlhf.memory import GIB, phases, shapes
from rlhf.model_folder import excess_ids
from rlhf.model_reward import ModelReward
from rlhf.named_engines import NAMESPACE, NamedEngines, engine_name, find_engines, is_offered, job_name
from rlhf.ray_start import add_node, find_announced, has_other_devices, start_ray, within
from rlhf.rollout import RolloutEngines
from rlhf.scoring import Scorer
from rlhf.teacher_responses import complete_responses
from rlhf.without_gpus import note_without_gpus, refusal_without_gpus

ROOT = Path(__file__).resolve().parent.parent
QUIET = {  # what the libraries would print in every actor
    "LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
RELEASE_SECONDS = 10.0
SHARES = 4  # actors that may sit on one bundle: each asks for this fraction of it


@dataclass(kw_only=True)
class Roles:
    """What a loop works with. A role that the task does not need is None."""

    policy: RankGroup
    data: PromptStream | RowStream
    reference: RankGroup | None = None
    teacher: RankGroup | None = None
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


class Cluster:
    """The resources of one run; a context manager that gives them back."""

    def __init__(self, config: Config, *, policy_ranks: int, num_engines: int):
        self.config, self.policy_ranks, self.num_engines = config, policy_ranks, num_engines
        self.address: str | None = None  # of the Ray that was joined or started here, LOCAL for the latter
        self.node: subprocess.Popen | None = None  # of this run's own, in another command's Ray
        self.named: NamedEngines | None = None  # of `megaray rollout`, which this run uses
        self.actors: list[Any] = []
        self.placement: PlacementGroup | None = None
        self.bundles: list[int] = []  # of the placement group, those of a node one after another
        self.scorer: Scorer | None = None
        self.predicted: dict[str, float] = {}  # peak of each phase on the fullest GPU, as metrics

    def __enter__(self) -> Cluster:
        self._connect()
        self._find_engines()
        self._reserve()
        if self.policy_ranks:
            self._fit()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        if self.address is not None:
            ray.shutdown()
        if self.node is not None:
            self.node.terminate()
            self.node.wait()

    def release(self) -> None:
        """End every actor, and give the places back."""
        if self.scorer is not None:
            self.scorer.close()
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []
        if self.placement is not None:
            within(RELEASE_SECONDS, remove_placement_group, self.placement)
            self.placement = None

    def build(self, folder: Path) -> Roles:
        """Create every actor of the task and wait until all are ready. They start side by side.

        With `seq_kd` engines answer the prompts first, by the teacher: `folder` is the run's.
        """
        config = self.config
        data_worker = self._data_worker()
        dataset = data_worker.setup.remote()
        if config.seq_kd:
            self._answer_by_teacher(data_worker, self._answer(dataset, "the data worker's setup"), folder)
        policy = RankGroup("policy", self._ranks(Policy, self.policy_ranks), timeout=config.call_timeout)
        frozen = self._frozen_ranks()
        reward_model = rollout = scorer = None
        if config.reward_model is not None:
            ranks = self._ranks(Frozen, self.policy_ranks, role="reward_model")
            reward_model = RankGroup("reward model", ranks, timeout=config.call_timeout)
        if config.task == "grpo":
            scorer = self.scorer = Scorer(self._reward_worker, config)
        groups = [ranks for ranks in (policy, *frozen.values(), reward_model) if ranks is not None]
        if samples(config):
            rollout = self._rollout(groups)
        for ranks in groups:
            ranks.setup()
        if reward_model is not None:
            scorer.model = ModelReward(reward_model, data_worker, config)
        info = self._answer(dataset, "the data worker's setup")
        print(info.describe())
        if rollout is not None:
            rollout.setup()
            rollout.stop_words += info.end_tokens
        if scorer is not None:
            scorer.wait_until_ready()
        stream = PromptStream if scorer is not None else PromptedRowStream if rollout is not None else RowStream
        ahead = config.dataloader_num_workers > 0
        data = stream(
            data_worker,
            num_rows=info.num_rows,
            timeout=config.call_timeout,
            ahead=ahead,
            evaluation_rows=info.evaluation_rows,
        )
        return Roles(policy=policy, data=data, rollout=rollout, scorer=scorer, **frozen)

    def _answer_by_teacher(self, data_worker: Any, info: DatasetInfo, folder: Path) -> None:
        """Sample the teacher's responses on the places that its ranks get afterwards."""
        config = replace(self.config, model=self.config.teacher.model, vllm_gpu_memory_utilization=MOST / 100)
        count = min(info.num_rows, total_steps(config, info.num_rows) * config.global_batch_size)
        engines = RolloutEngines(
            lambda index: self._teacher_engine(index, config), num_engines=self.policy_ranks, config=config
        )
        engines.stop_words += info.end_tokens
        prompts = PromptStream(data_worker, num_rows=info.num_rows, timeout=config.call_timeout)
        generate = partial(engines.generate, sampling={"excluded_ids": excess_ids(config.model, self.config.model)})
        responses = complete_responses(folder, prompts.batch_at, generate, count=count)
        self._answer(data_worker.adopt.remote(responses), "adopting the teacher's responses")
        for engine in engines.engines:
            ray.kill(engine)

    def _frozen_ranks(self) -> dict[str, RankGroup]:
        """The group of the reference or teacher that the task has beside the policy, by its role."""
        name = frozen_group(self.config)
        if name is None:
            return {}
        ranks = self._ranks(Frozen, getattr(self.config, name).nproc or self.policy_ranks, role=name)
        return {name: RankGroup(name, ranks, timeout=self.config.call_timeout)}

    def exporter(self) -> RankGroup:
        """The ranks of a conversion, with the model that they read."""
        ranks = self._ranks(Exporter, self.policy_ranks, env=exporter_actor.ENVIRONMENT)
        group = RankGroup("exporter", ranks, timeout=self.config.call_timeout)
        group.setup()
        return group

    def hugging_face(self) -> ActorGroup:
        """One process for models in transformers, on the driver's node."""
        kind = ray.remote(concurrency_groups={"report": 1})(HuggingFaceModel)
        return ActorGroup("transformers", [self._create(kind, self._beside_driver())], timeout=self.config.call_timeout)
    def build_inference(self) -> InferenceRoles:
        """Create what infer or eval needs, and wait until it is ready: engines with the model's own weights."""
        config = self.config
        reader = self._data_worker() if config.dataset else self._create(ray.remote(PromptEncoder), {"num_cpus": 0})
        setup = reader.setup.remote()
        if config.task == "eval":
            self.scorer = Scorer(self._reward_worker, config)
        roles = InferenceRoles(rollout=self.build_engines(), scorer=self.scorer)
        info = self._answer(setup, f"the setup of the {'data worker' if config.dataset else 'prompt encoder'}")
        roles.rollout.setup()
        if not config.dataset:
            roles.encoder = reader
            roles.rollout.stop_words += info
            return roles
        print(info.describe())
        roles.rollout.stop_words += info.end_tokens
        roles.data = PromptStream(reader, num_rows=info.num_rows, timeout=config.call_timeout, ahead=False)
        return roles

    def build_engines(self) -> RolloutEngines:
        """Engines alone; `setup` waits for them."""
        return self._rollout([])

    def _answer(self, ref: ray.ObjectRef, what: str) -> Any:
        try:
            return ray.get(ref, timeout=self.config.call_timeout)
        except ray.exceptions.GetTimeoutError:
            raise DataFailure(f"{what} did not finish within call_timeout, {self.config.call_timeout:.0f} s") from None
        except ray.exceptions.RayActorError as error:
            raise DataFailure(f"{what} failed: {error}") from error

    def _connect(self) -> None:
        """Join the cluster that RAY_ADDRESS, a submitted job or a `ray start` on this machine names; else start one here.

        vllm_mode server joins that of a `megaray rollout` on this machine, and brings this terminal's devices if they are others.
        """
        if not ray.is_initialized():
            under_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
            paths = [] if under_job else [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = {"PYTHONPATH": os.pathsep.join(paths)} if paths else {}
            config = self.config
            found = find_announced(config.rollout_name) if samples(config) and own_places(config) else None
            variables = {"env_vars": environment | QUIET}
            address = found.address if found else None
            self.address = start_ray(address=address, namespace=NAMESPACE, runtime_env=variables, log_to_driver=True)
            if found and has_other_devices(found):
                self.node = add_node(found.address)

    def _find_engines(self) -> None:
        """Use the engines of a `megaray rollout`, if there are some; and do not offer others of the same name."""
        name = self.config.rollout_name
        if self.config.task == "rollout" and is_offered(name):
            raise ValueError(f"this Ray cluster has rollout engines named {name}: end them, or choose another --rollout_name")
        if samples(self.config) and own_places(self.config):
            self.named = find_engines(name)
        if self.named is not None:
            self.config, self.num_engines = self.named.adopt(self.config), self.named.count
            print(f"using the rollout engines named {name} of `megaray rollout`: {self.num_engines}")

    def _reserve(self) -> None:
        """Reserve the bundles: policy ranks first, then the engines of server mode."""
        config = self.config
        own_bundles = 0 if self.named or not own_places(config) else self.num_engines * config.vllm_tensor_parallel_size
        count = self.policy_ranks + own_bundles
        bundle = {"CPU": config.cpus_per_rank}
        if ray.cluster_resources().get("GPU"):
            bundle["GPU"] = 1
        for kind, each in sorted(bundle.items(), reverse=True):  # GPUs first
            have = ray.cluster_resources().get(kind, 0)
            if have < each * count:
                raise ValueError(
                    f"{self.policy_ranks} policy ranks + {own_bundles} engine places need {count} x {each:g} {kind} = "
                    f"{each * count:g}, the cluster has {have:g}: lower nproc_per_node, rollout.num_engines or cpus_per_rank, "
                    "or add nodes"
                )
        name = config.rollout_name if config.task == "rollout" else ""
        self.placement = placement_group([bundle] * count, strategy="PACK", name=name)
        if not self.placement.wait(timeout_seconds=min(config.call_timeout, 300)):
            raise ValueError(
                f"Ray could not place {count} bundles of {bundle}: other jobs hold the cluster's resources "
                f"(free now: {ray.available_resources()})"
            )
        self.bundles = by_node(placement_group_table(self.placement)["bundles_to_node_id"])

    def _fit(self) -> None:
        """Complete the config with what depends on the GPUs' memory. ValueError when the run cannot fit them."""
        if self.config.task == "export":  # what it takes is what the model takes
            return
        given, models = self.config, shapes(self.config)
        if "GPU" not in self.placement.bundle_specs[0]:
            if text := refusal_without_gpus(given, models[0]):
                raise ValueError(text)
            if text := note_without_gpus(given):
                print(f"note: {text}")
            if given.offload_model or given.offload_optimizer:
                print("note: without GPUs there is no other memory to move to: offload_model, offload_optimizer do nothing")
            self.config = fit(given, *models, None)
            return
        devices = self._answer(ray.remote(find_devices).options(**self._on_bundle(0)).remote(), "looking at the GPUs")
        if not devices.gpus:
            raise ValueError("Ray counts GPUs on a node where nvidia-smi shows none: install it there, or start Ray without them")
        room = *models, devices.memory
        self.config = fit(given, *room)
        check_host(self.config, *models, devices.host_memory)
        for text in filter(None, [note(given, self.config, *room), warning(self.config, *room)]):
            print(f"note: {text}")
        self.predicted = {f"predicted_gpu_gib_{phase}": size / GIB for phase, size in phases(self.config, *room).items()}

    @property
    def _shares_gpus(self) -> bool:
        """Engines and policy use the same GPUs by turns."""
        return not own_places(self.config) and "GPU" in self.placement.bundle_specs[0]

    def _rollout(self, ranks: list[RankGroup]) -> RolloutEngines:
        """The engines; where they share GPUs with `ranks`, each rank pushes to those on its own GPU."""
        if self.named is not None:
            config = self.config
            return RolloutEngines(
                self.named, num_engines=self.num_engines, config=config, start=lambda engine: engine.serve.remote(config)
            )
        if not self._shares_gpus:
            return RolloutEngines(self._engine, num_engines=self.num_engines, config=self.config)
        width = self.config.vllm_tensor_parallel_size
        rollout = RolloutEngines(
            self._engine,
            num_engines=self.num_engines,
            config=self.config,
            sender_of=lambda index: index * width,
            neighbours=ranks,
        )
        for group in ranks:
            group.before_work = partial(rollout.make_room, group)
        return rollout

    def _ranks(self, kind: type, count: int, *, env: dict[str, str] | None = None, **arguments: Any) -> list[Any]:
        return [
            self._create(
                ray.remote(concurrency_groups={"report": 1})(kind),
                self._on_bundle(rank % self.policy_ranks),
                env=env,
                rank=rank,
                world_size=count,
                **arguments,
            )
            for rank in range(count)
        ]

    def _engine(self, index: int) -> Any:
        config = self.config
        first = index * config.vllm_tensor_parallel_size
        options = self._on_bundle(first + self.policy_ranks, share=1) if own_places(config) else self._on_bundle(first)
        if config.task == "rollout":
            options |= {"name": engine_name(config.rollout_name, index), "namespace": NAMESPACE}
        kind = ray.remote(max_concurrency=1000)(RolloutEngine)
        loads = config.task in INFER
        arguments = {"index": index, "load_weights": loads, "sleeps": self._shares_gpus}
        return self._create(kind, options, env=rollout_actor.ENVIRONMENT, **arguments)

    def _teacher_engine(self, index: int, config: Config) -> Any:
        """One with the model folder's weights, on the place of a rank that does not use it yet."""
        kind, env = ray.remote(max_concurrency=1000)(RolloutEngine), rollout_actor.ENVIRONMENT
        return self._create(kind, self._on_bundle(index), config=config, env=env, index=index, load_weights=True)

    def _reward_worker(self, index: int) -> Any:
        return self._create(ray.remote(RewardWorker), {"num_cpus": 0})

    def _data_worker(self) -> Any:
        """On the driver's node, where the dataset files are. Its name says that named engines are taken."""
        kind = ray.remote(concurrency_groups={"report": 1})(DataWorker)
        name = {"name": job_name(self.named.name), "namespace": NAMESPACE} if self.named else {}
        return self._create(kind, self._beside_driver() | name)

    def _beside_driver(self) -> dict[str, Any]:
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return {"num_cpus": 0, "scheduling_strategy": node}

    def _on_bundle(self, place: int, share: float = 1 / SHARES) -> dict[str, Any]:
        index = self.bundles[place]
        strategy = PlacementGroupSchedulingStrategy(self.placement, placement_group_bundle_index=index)
        options = {"scheduling_strategy": strategy, "num_cpus": self.config.cpus_per_rank * share}
        if self.placement.bundle_specs[index].get("GPU"):
            options["num_gpus"] = share
        return options

    def _create(
        self,
        kind: Any,
        options: dict[str, Any],
        *,
        config: Config | None = None,
        env: dict[str, str] | None = None,
        **arguments: Any,
    ) -> Any:
        threads = {"OMP_NUM_THREADS": str(max(1, int(self.config.cpus_per_rank)))}
        kind = kind.options(runtime_env={"env_vars": threads | (env or {})}, **options)
        actor = kind.remote(config or self.config, **arguments)
        self.actors.append(actor)
        return actor


def by_node(nodes: dict[int, str]) -> list[int]:
    """Bundles of {bundle: node id} in the order of ranks: a node's stand together, those of the fullest node first."""
    size = Counter(nodes.values())
    return sorted(nodes, key=lambda bundle: (-size[nodes[bundle]], nodes[bundle], bundle))
