"""The resources of one run: joins or starts Ray, reserves places, fits the run into their memory, starts actors on them.

A place is one placement bundle, on one node. A policy rank's is a GPU with its share of CPUs, or CPUs alone; in colocate mode
engines sit on such places too, as frozen models do (reference, teacher, reward model). In server mode an engine has a place of
its own, as large as it is wide; so has an engine of a teacher, and a rank of one with `teacher.own_devices`. The data and reward
actors take none. `rlhf.roles` and `rlhf.engines` say what is started.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable
from math import floor
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from actors.group import LongWait
from rlhf.config import Config
from rlhf.counts import own_places, samples, teacher_engines, teacher_places, teacher_width
from rlhf.data import DataFailure
from rlhf.devices import find_devices
from rlhf.fewer_places import with_less
from rlhf.fit import check_host, fit, note, warning
from rlhf.memory import GIB, shapes
from rlhf.named_engines import NAMESPACE, NamedEngines, find_engines, is_offered
from rlhf.phases import phases
from rlhf.ray_start import add_node, end_process, find_announced, has_other_devices, start_ray, within
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


class Cluster:
    """The resources of one run; a context manager that gives them back."""

    def __init__(self, config: Config, *, policy_ranks: int, num_engines: int):
        self.config, self.policy_ranks, self.num_engines = config, policy_ranks, num_engines
        self.address: str | None = None  # of the Ray that was joined or started here, LOCAL for the latter
        self.node: subprocess.Popen | None = None  # of this run's own, in another command's Ray
        self.named: NamedEngines | None = None  # of `megaray rollout`, which this run uses
        self.actors: list[Any] = []
        self.placement: PlacementGroup | None = None
        self.bundles: list[int] = []  # of the placement group, by place: a node's stand together
        self.teacher_places = range(0)  # that a teacher has to itself
        self.nodes: dict[int, str] = {}  # of each bundle
        self.before_release: list[Callable[[], None]] = []  # what must know that its actors end
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
            end_process(self.node)

    def release(self) -> None:
        """End every actor, and give the places back."""
        for close in self.before_release:
            close()
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []
        if self.placement is not None:
            within(RELEASE_SECONDS, remove_placement_group, self.placement)
            self.placement = None

    @property
    def has_gpus(self) -> bool:
        """A place has a GPU."""
        return "GPU" in self.placement.bundle_specs[0]

    @property
    def shares_gpus(self) -> bool:
        """Engines and policy use the same GPUs by turns."""
        return not own_places(self.config) and self.has_gpus

    def create(
        self,
        kind: Any,
        options: dict[str, Any],
        *,
        config: Config | None = None,
        env: dict[str, str] | None = None,
        **arguments: Any,
    ) -> Any:
        """Start an actor of a Ray class: `kind(config, **arguments)`; it ends with this run."""
        threads = {"OMP_NUM_THREADS": str(max(1, int(self.config.cpus_per_rank)))}
        kind = kind.options(runtime_env={"env_vars": threads | (env or {})}, **options)
        actor = kind.remote(config or self.config, **arguments)
        self.actors.append(actor)
        return actor

    def on_place(self, place: int, share: float = 1 / SHARES) -> dict[str, Any]:
        """Ray's options for an actor that takes a `share` of a place."""
        index = self.bundles[place]
        strategy = PlacementGroupSchedulingStrategy(self.placement, placement_group_bundle_index=index)
        size = self.placement.bundle_specs[index]
        options = {"scheduling_strategy": strategy, "num_cpus": part(size["CPU"], share)}
        if size.get("GPU"):
            options["num_gpus"] = part(size["GPU"], share)
        return options

    def gpus(self, places: Iterable[int]) -> list[str]:
        """The GPUs of places of one each, as CUDA_VISIBLE_DEVICES names them."""
        look = ray.remote(_assigned_gpu)
        return self.answer([look.options(**self.on_place(place)).remote() for place in places], "looking at the GPUs")

    def beside_driver(self) -> dict[str, Any]:
        """Ray's options for an actor on this process's node, on no place."""
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return {"num_cpus": 0, "scheduling_strategy": node}

    def answer(self, ref: ray.ObjectRef | list[ray.ObjectRef], what: str) -> Any:
        """What a call, or each of several, gives within call_timeout. DataFailure otherwise, or when its actor died."""
        limit = f"call_timeout, {self.config.call_timeout:.0f} s"
        try:
            with LongWait(what, lambda: f"  it may take {limit}") as news:
                return news.get(ref, time.monotonic() + self.config.call_timeout)
        except ray.exceptions.GetTimeoutError:
            raise DataFailure(f"{what} did not finish within {limit}: raise it") from None
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
        """Reserve the places: policy ranks first, then the engines of server mode, then a teacher's own."""
        config = self.config
        engines = 0 if self.named or not own_places(config) else self.num_engines
        places = {
            "policy ranks": [1] * self.policy_ranks,
            "engine places": [config.vllm_tensor_parallel_size] * engines,
            "places of the teacher": teacher_places(config),
        }
        widths = [width for group in places.values() for width in group]
        self.teacher_places = range(self.policy_ranks + engines, len(widths))
        rank = {"CPU": config.cpus_per_rank}
        if ray.cluster_resources().get("GPU"):
            rank["GPU"] = 1
        self._require_resources(rank, {name: sum(group) for name, group in places.items() if group}, engines)
        bundles = [{kind: each * width for kind, each in rank.items()} for width in widths]
        name = config.rollout_name if config.task == "rollout" else ""
        self.placement = placement_group(bundles, strategy="PACK", name=name)
        if not self.placement.wait(timeout_seconds=min(config.call_timeout, 300)):
            sizes = " and ".join(f"{count} of {size}" for size, count in Counter(map(str, bundles)).items())
            raise ValueError(
                f"Ray could not place {len(bundles)} bundles, {sizes}: other jobs hold the cluster's resources "
                f"(free now: {ray.available_resources()})"
            )
        self.nodes = placement_group_table(self.placement)["bundles_to_node_id"]
        self.bundles = by_node(self.nodes)
        if max(widths) > 1:  # else every bundle will do for a rank
            self.bundles.sort(key=lambda bundle: (bundle >= self.policy_ranks) + (bundle >= self.teacher_places.start))

    def _require_resources(self, rank: dict[str, float], counts: dict[str, int], engines: int) -> None:
        """ValueError when the cluster lacks so many of what each `rank` takes, or an engine's share of them on one node.

        `engines`: those with places of their own.
        """
        count, widest = sum(counts.values()), {}
        if self.num_engines and self.named is None:
            widest["vllm_tensor_parallel_size"] = self.config.vllm_tensor_parallel_size
        if teacher_engines(self.config):
            widest["teacher.tensor_model_parallel_size"] = teacher_width(self.config)
        for kind, each in sorted(rank.items(), reverse=True):  # GPUs first
            have = ray.cluster_resources().get(kind, 0)
            if have < each * count:
                wanted = " + ".join(f"{number} {name}" for name, number in counts.items())
                raise ValueError(
                    f"{wanted} need {count} x {each:g} {kind} = {each * count:g}, the cluster has {have:g}: "
                    f"{with_less(self.config, kind, engine_places=engines)}"
                )
            most = max(node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"])
            for name, width in widest.items():
                if most < each * width:
                    raise ValueError(f"{name} {width} needs {each * width:g} {kind} on one node, no node has more than {most:g}")

    def _fit(self) -> None:
        """Complete the config with what depends on the GPUs' memory. ValueError when the run cannot fit them."""
        if self.config.task == "export":  # what it takes is what the model takes
            return
        given, models = self.config, shapes(self.config)
        if not self.has_gpus:
            if text := refusal_without_gpus(given, models[0]):
                raise ValueError(text)
            if text := note_without_gpus(given):
                print(f"note: {text}")
            if given.offload_model or given.offload_optimizer:
                print("note: without GPUs there is no other memory to move to: offload_model, offload_optimizer do nothing")
            self.config = fit(given, *models, None)
            return
        devices = self.answer(ray.remote(find_devices).options(**self.on_place(0)).remote(), "looking at the GPUs")
        if not devices.gpus:
            raise ValueError("Ray counts GPUs on a node where nvidia-smi shows none: install it there, or start Ray without them")
        room = *models, devices.memory
        self.config = fit(given, *room)
        check_host(self.config, *models, devices.host_memory)
        for text in filter(None, [note(given, self.config, *room), warning(self.config, *room)]):
            print(f"note: {text}")
        self.predicted = {f"predicted_gpu_gib_{phase}": size / GIB for phase, size in phases(self.config, *room).items()}


def _assigned_gpu() -> str:
    """The GPU of the place that this runs on."""
    (gpu,) = ray.get_gpu_ids()
    return str(gpu)


def part(size: float, share: float) -> float:
    """Of a resource, in the ten-thousandths that Ray counts in. Rounded down: the parts of a place must not be more than it."""
    return floor(size * share * 10_000 + 1e-6) / 10_000


def by_node(nodes: dict[int, str]) -> list[int]:
    """Bundles of {bundle: node id} in the order of ranks: a node's stand together, those of the fullest node first."""
    size = Counter(nodes.values())
    return sorted(nodes, key=lambda bundle: (-size[nodes[bundle]], nodes[bundle], bundle))
