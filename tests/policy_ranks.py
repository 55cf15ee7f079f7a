"""Policy ranks for tests: real Ray actors that build one policy after another, so that imports are paid once a process."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.records import GroupTokens, RowTokens, SequenceRef, Shard

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
TEMPERATURE = 0.8
GRADIENT_HOOK = "DistributedDataParallel._make_backward_post_hook.<locals>.hook"


def policy_config(model: Path, **options: Any) -> SimpleNamespace:
    """The attributes of the run's config that a policy rank reads."""
    role = SimpleNamespace(model=None, tensor_model_parallel_size=None, pipeline_model_parallel_size=None, nproc=None)
    defaults = {
        "task": "grpo",
        "model": str(model),
        "mcore_model": None,
        "torch_dtype": None,
        "seed": 42,
        "temperature": TEMPERATURE,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "sequence_parallel": False,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": 1,
        "overlap_grad_reduce": False,
        "overlap_param_gather": False,
        "moe_permute_fusion": False,
        "moe_shared_expert_overlap": False,
        "moe_aux_loss_coeff": 0.0,
        "moe_z_loss_coeff": None,
        "moe_expert_capacity_factor": None,
        "moe_pad_expert_input_to_capacity": False,
        "moe_token_drop_policy": "probs",
        "moe_router_dtype": "fp32",
        "use_distributed_optimizer": True,
        "train_iters": 10,
        "num_train_epochs": None,
        "recompute_granularity": "selective",
        "recompute_method": None,
        "recompute_num_layers": None,
        "recompute_modules": ["core_attn"],
        "attention_backend": None,
        "gradient_accumulation_fusion": None,
        "optimizer_cpu_offload": False,
        "optimizer_offload_fraction": 1.0,
        "cross_entropy_loss_fusion": True,
        "lr": 1e-3,
        "min_lr": 0.0,
        "lr_decay_style": "cosine",
        "lr_warmup_iters": 0,
        "lr_warmup_fraction": None,
        "weight_decay": 0.1,
        "clip_grad": 1.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_eps": 1e-6,
        "tuner_type": "full",
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "lora_dropout": 0.0,
        "target_modules": ["all-linear"],
        "modules_to_save": [],
        "merge_lora": None,
        "save_safetensors": True,
        "no_save_optim": False,
        "no_save_rng": False,
        "no_load_optim": False,
        "no_load_rng": False,
        "call_timeout": 120.0,
        "push_timeout": 60.0,
        "deterministic": False,
        "offload_model": False,
        "offload_optimizer": False,
        "offload_teacher_model": False,
        "megatron": {},
        "environment": {},
        "num_labels": None,
        "problem_type": None,
        "reference": role,
        "teacher": role,
        "beta": 0.5,
        "sft_alpha": 0.0,
        "gkd_logits_topk": None,
    }
    unknown = set(options) - set(defaults)
    assert not unknown, unknown
    return SimpleNamespace(**(defaults | options))


class PolicyHost:
    """A process that holds one rank after another."""

    held: Any = None

    def start(self, config: Any, rank: int, world_size: int, kind: str = "Policy", role: str | None = None) -> None:
        from actors.exporter import Exporter
        from actors.frozen import Frozen
        from actors.policy import Policy

        kinds = {"Policy": Policy, "Frozen": Frozen, "Exporter": Exporter}
        self.held = kinds[kind](config, rank=rank, world_size=world_size, **({} if role is None else {"role": role}))

    def stop(self) -> None:
        import sys

        if "megatron.core" not in sys.modules:
            return
        if self.held is not None:
            vars(self.held).clear()  # it came before its imports, so no collection would look at it
        self.held = None
        from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

        for held in gc.get_objects():  # what Megatron's models hold past C++, where no collection looks
            if type(held) is FunctionType and held.__qualname__ == GRADIENT_HOOK:
                for cell in held.__closure__:
                    del cell.cell_contents
            elif issubclass(type(held), MoETokenDispatcher):
                vars(held).clear()  # probabilities of the last micro batch: their graph holds the model and its groups
        import torch.distributed as dist
        from megatron.core import parallel_state

        if dist.is_initialized():
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
        from mcore_bridge.bridge import gpt_bridge
        from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        RotaryEmbedding.forward.cache_clear()  # by module, and a module holds a group
        gpt_bridge.EP_PP_GROUP = None  # mcore-bridge makes one for the life of a process
        get_moe_layer_wise_logging_tracker().clear()  # it has as many layers as the first model
        for name in ("FLASH", "FUSED", "UNFUSED"):
            os.environ.pop(f"NVTE_{name}_ATTN", None)

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self if method == "gradients" else self.held, method)(*args)

    def gradients(
        self, shard: Shard, loss: Any, old: Any = None, ref: Any = None, batch_values: Any = None, teacher: Any = None
    ) -> dict[str, np.ndarray]:
        """By parameter, those of a step that is not taken, summed over the data ranks; without the distributed optimizer."""
        policy = self.held
        policy.training.zero_gradients()
        policy._run(policy._packed(shard, old, ref, batch_values), loss, teacher, backward=True)
        return {name: parameter.main_grad.numpy().copy() for name, parameter in policy.training.module.named_parameters()}

    def weight_bytes(self) -> int:
        """Of the storages that the model is on."""
        storages = {id(p): p.untyped_storage() for p in self.held.model.module.parameters()}
        return sum(storage.nbytes() for storage in storages.values())

    def host_bytes(self) -> int:
        """Of the host memory that the optimizer's state goes to."""
        return self.held.optimizer_state.host.numel()

    def bytes_held(self) -> dict[str, int]:
        """Of the storages that weights, gradients and the optimizer's state are on."""
        training = self.held.training
        held = {
            "weights": list(training.module.parameters()),
            "gradients": [buffer.grad_data for buffer in training.module.buffers],
            "optimizer": list(training.state_tensors()),
        }
        storages = {name: {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors} for name, tensors in held.items()}
        return {name: sum(storage.nbytes() for storage in found.values()) for name, found in storages.items()}


@dataclass
class Hosts:
    """Processes that tests share; `start` makes them a group."""

    actors: list[Any]

    def start(self, config: Any, size: int, *, kind: str = "Policy", frozen: str | None = None) -> Group:
        """`frozen`: the role of ranks that only score, reference or teacher."""
        import ray

        ray.get([actor.stop.remote() for actor in self.actors], timeout=120)  # NCCL leaves a group when all of it do
        used = self.actors[:size]
        ray.get([actor.start.remote(config, rank, size, "Frozen" if frozen else kind, frozen) for rank, actor in enumerate(used)])
        master = ray.get(used[0].call.remote("node_address"))
        infos = ray.get([actor.call.remote("setup", master) for actor in used], timeout=120)
        return Group(actors=used, infos=infos)


@dataclass
class Group:
    """A started policy; calls go to every rank."""

    actors: list[Any]
    infos: list[Any]

    @property
    def data_size(self) -> int:
        return self.infos[0].data_size

    def call(self, method: str, *args: Any) -> list[Any]:
        import ray

        return ray.get([actor.call.remote(method, *args) for actor in self.actors], timeout=120)

    def on_shards(self, method: str, shards: list[Shard], *args: Any) -> list[Any]:
        """The results of the ranks that return some."""
        import ray

        refs = [actor.call.remote(method, shards[info.data_rank], *args) for actor, info in zip(self.actors, self.infos)]
        two = method in ("logprobs", "sequence_values")
        results = [result[1] if two else result for result in ray.get(refs, timeout=120)]
        for result, info in zip(results, self.infos):
            assert (result is not None) == info.returns_logprobs
        return [result for result in results if result is not None]

    def gradients(self, shards: list[Shard], *args: Any) -> dict[str, np.ndarray]:
        """Of the first rank."""
        import ray

        calls = zip(self.actors, self.infos)
        return ray.get([actor.call.remote("gradients", shards[info.data_rank], *args) for actor, info in calls], timeout=120)[0]

    def on_shards_refs(self, method: str, shards: list[Shard], *args: Any) -> list[Any]:
        """As `on_shards`, by reference."""
        import ray

        return [ray.put(result) for result in self.on_shards(method, shards, *args)]

    def logprobs(self, shards: list[Shard], *args: Any) -> dict[int, np.ndarray]:
        merged: dict[int, np.ndarray] = {}
        for part in self.on_shards("logprobs", shards, *args):
            merged |= part
        return merged

    def train_step(self, shards: list[Shard], *args: Any) -> dict[str, float]:
        """The metrics, which every returning rank must agree on."""
        results = self.on_shards("train_step", shards, *args)
        assert all(result == results[0] for result in results), results
        return results[0]


def start_hosts(count: int, *, gpus: float = 0) -> Hosts:
    """`count` processes in the Ray that runs, each on so many GPUs."""
    import ray

    kind = ray.remote(PolicyHost).options(num_cpus=1, num_gpus=gpus)
    return Hosts(actors=[kind.remote() for _ in range(count)])


def random_rows(count: int, *, seed: int = 0, longest: int = 40, vocabulary: int = 512) -> RowTokens:
    """Rows of random tokens; the first 2 tokens of each are not trained."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(5, longest, count)
    return RowTokens(
        token_ids=tuple(generator.integers(3, vocabulary, length).astype(np.int32) for length in lengths),
        loss_masks=tuple(np.r_[0, 0, np.ones(length - 2)].astype(np.float32) for length in lengths),
    )


def shards_of(rows: RowTokens, source: Any, split: list[list[list[int]]], advantages: np.ndarray | None = None) -> list[Shard]:
    """One shard for each data rank; `split[data rank][micro batch]` names rows. Every trained token has the same weight."""
    total = int(sum(mask.sum() for mask in rows.loss_masks))

    def reference(item: int) -> SequenceRef:
        advantage = 0.0 if advantages is None else float(advantages[item])
        length = len(rows.token_ids[item])
        return SequenceRef(source=0, item=item, key=100 + item, length=length, weight=1 / total, advantage=advantage)

    return [
        Shard(
            sources=(source,),
            micro_batches=tuple(tuple(reference(item) for item in items) for items in micro_batches),
            num_tokens=total,
            num_sequences=len(rows.token_ids),
        )
        for micro_batches in split
    ]


def as_group(rows: RowTokens, prompt: int, rollout_logprobs: list[np.ndarray]) -> GroupTokens:
    """Rows that share their first `prompt` tokens as responses of one prompt."""
    return GroupTokens(
        prompt_ids=rows.token_ids[0][:prompt],
        response_ids=tuple(ids[prompt:] for ids in rows.token_ids),
        rollout_logprobs=tuple(rollout_logprobs),
    )


def ratio_loss(logprobs, batch):
    """A policy-gradient loss that reads every field of a micro batch: ratio to the old logprobs times advantage."""
    ratio = (logprobs - batch.old_logprobs).exp()
    weights = batch.weights * batch.loss_mask
    loss = -(weights * ratio * batch.advantages).sum() - 0.1 * (weights * (logprobs - batch.ref_logprobs)).sum()
    tokens = batch.loss_mask.sum() / batch.num_tokens
    return loss, {"tokens": tokens, "max_ratio": (ratio * batch.loss_mask).max().detach()}


def nll_loss(logprobs, batch):
    """Negative log likelihood of the trained tokens, and their number."""
    loss = -(batch.weights * batch.loss_mask * logprobs).sum()
    return loss, {"count": batch.loss_mask.sum()}


def nan_loss(logprobs, batch):
    """A loss that went wrong."""
    return logprobs.sum() * float("nan"), {}


def hugging_face(folder: Path):
    """The float32 model of a folder; only in a process that does not import mcore-bridge."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def sequence_logprobs(hf, token_ids: np.ndarray, temperature: float = TEMPERATURE) -> torch.Tensor:
    """[L], the first 0."""
    import torch

    ids = torch.from_numpy(token_ids.astype(np.int64))
    logits = hf(input_ids=ids[None]).logits[0].float() / temperature
    chosen = logits.log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0]
    return torch.cat([torch.zeros(1), chosen])


def largest_difference(a: dict[Any, np.ndarray], b: dict[Any, np.ndarray]) -> float:
    assert a.keys() == b.keys()
    return max(float(np.abs(np.asarray(a[key]) - np.asarray(b[key])).max()) for key in a)
