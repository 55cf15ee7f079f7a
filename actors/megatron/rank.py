"""What training and scoring ranks share: meeting the others, the model, logprobs, and a report of what goes on."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.device_memory import memory_explained, peak_gib
from actors.imports import lasting_imports
from actors.model_folder import require_megatron, require_model
from actors.progress import Progress
from rlhf.config import FrozenRole
from rlhf.heads import Head
from rlhf.model_folder import read_shape
from rlhf.pipeline import frozen_pipeline
from rlhf.records import RankInfo, Shard

if TYPE_CHECKING:
    import numpy as np
    import torch
    from ray import ObjectRef

    from actors.megatron.micro_batch import PackedMicroBatch
    from actors.megatron.model import Model
    from actors.megatron.platform import Platform
    from rlhf.records import MicroBatch

    # From the outputs of a micro batch (logprobs [T], or what a head gives, [B, K]): values of each of its sequences, [B, K].
    SequenceValues = Callable[[torch.Tensor, MicroBatch], torch.Tensor]


OF_THE_RUN = FrozenRole()  # the model and the sizes of the policy
MEMORY_RETURNS = 15.0  # seconds after which the driver has freed the memory of a process that died


class MegatronRank:
    """One process of a group that holds a model together."""

    trains = True  # the weights change
    platform: Platform | None = None  # once `load_libraries` is done
    model: Model
    module: torch.nn.Module  # what is called: Megatron's DDP around the model, or the model itself

    def __init__(self, config: Any, *, rank: int, world_size: int):
        self.config, self.rank, self.world_size = config, rank, world_size
        self.listener: socket.socket | None = None  # of rank 0, until the process group has it
        self.progress = Progress()

    def node_address(self) -> str:
        """This node's ip and a port for the other ranks to meet at, held from now on."""
        ip = ray.util.get_node_ip_address()
        self.listener = socket.socket()
        self.listener.bind((ip, 0))
        return f"{ip}:{self.listener.getsockname()[1]}"

    def load_libraries(self) -> None:
        """Import what takes long, while other groups set up; nothing the second time."""
        if self.platform is not None:
            return
        os.environ.setdefault("TQDM_DISABLE", "1")
        with self.progress.doing("importing Megatron"), lasting_imports():
            from actors.megatron.platform import start_platform

            platform = start_platform()
            import_module("mcore_bridge")
        self.platform = platform

    @ray.method(concurrency_group="report")
    def report(self) -> str:
        """What this rank is doing now, and for how long."""
        return self.progress.report()

    @ray.method(num_returns=2)
    def logprobs(self, shard: Shard, reference: bool = False) -> tuple[None, dict[int, np.ndarray] | None]:
        """Per sequence key [L] float32: the logprob of each token given those before it, at the run's temperature; the first 0.

        The second value, so that the controller can wait for the first and leave it where it is; it is None too on ranks that
        do not return results. `reference` switches the adapter off.
        """
        from actors.megatron.forward_backward import run_micro_batches
        from actors.megatron.lora import adapter_disabled
        from actors.megatron.micro_batch import split_logprobs
        from actors.megatron.parallel import returns_results

        with self.doing("logprobs"):
            assert not reference or self.model.has_adapter, "only a model with an adapter can be its own reference"
            batches = self._packed(shard)
            with adapter_disabled(self.model) if reference else nullcontext():
                packed = run_micro_batches(self.module, batches, self._score, backward=False)
            if not returns_results():
                return None, None
            result: dict[int, np.ndarray] = {}
            for batch, values in zip(batches, packed):
                result |= split_logprobs(batch, values.cpu().numpy())
            return None, result

    @ray.method(num_returns=2)
    def token_logits(
        self, shard: Shard, vocab_size: int, top_k: int | None, reference: bool = False
    ) -> tuple[None, dict[int, ObjectRef] | None]:
        """Per sequence key a reference to the `TokenLogits` of this rank's columns, or over all ranks of the `top_k` likeliest.

        `vocab_size`: the tokens that the model has in common with who compares. Two values as `logprobs`; the second is None on
        ranks without logits. `reference` switches the adapter off.
        """
        from megatron.core import parallel_state

        from actors.megatron.distillation import keep_logits
        from actors.megatron.forward_backward import run_micro_batches
        from actors.megatron.lora import adapter_disabled

        def output_logits(logits: torch.Tensor, micro_batch: PackedMicroBatch) -> tuple[torch.Tensor, dict[int, ObjectRef]]:
            kept = keep_logits(logits, micro_batch, vocab_size=vocab_size, top_k=top_k)
            return logits.new_zeros(()), kept

        with self.doing("token_logits"):
            batches = self._packed(shard)
            with self.weights_here(), adapter_disabled(self.model) if reference else nullcontext():
                kept = run_micro_batches(self.module, batches, output_logits, backward=False)
            self.platform.release_memory()  # to the policy, on whose device this may be
            if not parallel_state.is_pipeline_last_stage():
                return None, None
            return None, {key: ref for part in kept for key, ref in part.items()}

    @ray.method(num_returns=2)
    def sequence_values(
        self, shard: Shard, values: SequenceValues, ref: list[ObjectRef] | None = None, reference: bool = False
    ) -> tuple[None, dict[int, np.ndarray] | None]:
        """Per sequence key what `values` makes of the model's output, [K] of its dtype, without gradient; else as `logprobs`."""
        from actors.megatron.forward_backward import run_micro_batches
        from actors.megatron.lora import adapter_disabled
        from actors.megatron.parallel import returns_results

        def output_values(logits: torch.Tensor, micro_batch: PackedMicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
            result = values(self._outputs(logits, micro_batch), micro_batch.batch)
            return result.sum(), result

        with self.doing("sequence_values"):
            batches = self._packed(shard, ref=ref)
            with adapter_disabled(self.model) if reference else nullcontext():
                results = run_micro_batches(self.module, batches, output_values, backward=False)
            if not returns_results():
                return None, None
            rows = zip(batches, (result.cpu().numpy() for result in results))
            return None, {ref.key: row[i] for batch, row in rows for i, ref in enumerate(batch.sequences)}

    def leave_device(self, weights: bool) -> None:
        """Make room for engines on the same device; with `weights` also those of the model, if `offload_model`."""
        with self.doing("leave_device"):
            self.offload(weights)
            self.platform.release_memory()
            peak_gib()  # from here on that of the next phase

    def enter_device(self) -> None:
        """Bring back what left."""
        with self.doing("enter_device"):
            self.patiently(self.come_back)

    def patiently(self, come_back: Callable[[], None]) -> None:
        """Call it until there is memory: an engine that has just died may still hold some, and that is waited for."""
        deadline = time.monotonic() + MEMORY_RETURNS
        while True:
            try:
                return come_back()
            except RuntimeError as error:
                if "out of memory" not in str(error) or time.monotonic() > deadline:
                    raise
                self.platform.release_memory()
                time.sleep(0.5)

    @contextmanager
    def weights_here(self) -> Iterator[None]:
        """The weights are on the device meanwhile: where a model waits elsewhere between its calls, they come for this one."""
        yield

    def offload(self, weights: bool) -> None:
        """Move to host memory what is to leave."""
        if weights and self.config.offload_model:
            self.leave_weights()

    def leave_weights(self) -> None:
        """Move the model to host memory."""
        tensors = chain(self.model.module.parameters(), self.model.module.buffers())
        self.weights.leave(tensors, unchanged=not self.trains)

    def come_back(self) -> None:
        """Undo `offload`; after it has failed it can be called again."""
        self.weights.come_back()

    @contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        """Name what goes on for `report`; too little memory then becomes a ValueError."""
        with self.progress.doing(phase), memory_explained(f"{type(self).__name__.lower()} rank {self.rank}, {phase}"):
            yield

    @property
    def multiple(self) -> int:
        """Micro batches have a multiple of this many tokens."""
        return self.model.sizes.token_multiple

    def _start(self, master: str, *, head: Head, role: FrozenRole = OF_THE_RUN) -> None:
        """Join the group at `master` and build this rank's part of the run's model, or of a frozen role's own, with this head.

        Its weights are the safetensors in its folder, or those of the Megatron checkpoint that the run starts from.
        """
        config = self.config
        model, megatron = role.model or config.model, None if role.model else config.mcore_model
        require_model(model)
        if megatron is not None:
            require_megatron(megatron)
        self.load_libraries()
        from actors.megatron.checkpoint import load_model, load_weights
        from actors.megatron.model import build_model, split_options
        from actors.megatron.offload import Offload
        from actors.megatron.parallel import ParallelSizes, start_process_group

        tensor = role.tensor_model_parallel_size or config.tensor_model_parallel_size
        has_experts = read_shape(Path(model)).experts is not None  # a teacher may, and the policy not, or the other way round
        sizes = ParallelSizes(
            tensor=tensor,
            pipeline=frozen_pipeline(config, role),
            sequence=config.sequence_parallel and tensor > 1,
            expert=config.expert_model_parallel_size if has_experts else 1,
            expert_tensor=config.expert_tensor_parallel_size if has_experts else 1,
        )
        start_process_group(
            self.platform,
            sizes,
            rank=self.rank,
            world_size=self.world_size,
            master=master,
            listener=self.listener,
            seed=config.seed,
            timeout=config.call_timeout,
        )
        self.model_options, self.optimizer_options, self.ddp_options = split_options(config.megatron)
        self.model = build_model(config, model, sizes, self.platform, self.model_options, head)
        if megatron is None:
            load_weights(self.model, Path(model))
        else:
            load_model(self.model, Path(megatron))
        self.weights = Offload(self.platform)
        self.module = self.model.module

    def _info(self) -> RankInfo:
        from megatron.core import parallel_state

        from actors.megatron.parallel import returns_results

        return RankInfo(
            rank=self.rank,
            node_ip=ray.util.get_node_ip_address(),
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
            returns_logprobs=returns_results(),
        )

    def _packed(
        self,
        shard: Shard,
        old: list[ObjectRef] | None = None,
        ref: list[ObjectRef] | None = None,
        batch_values: list[ObjectRef] | None = None,
    ) -> list[PackedMicroBatch]:
        """The micro batches of a shard; `old`, `ref`, `batch_values`: results of `logprobs` and `sequence_values`."""
        from actors.megatron.micro_batch import fetch_by_key, fetch_sources, pack_micro_batches

        return pack_micro_batches(
            shard,
            fetch_sources(shard),
            device=self.platform.device,
            multiple=self.multiple,
            old=fetch_by_key(old),
            ref=fetch_by_key(ref),
            batch_values=fetch_by_key(batch_values),
        )

    def _outputs(self, logits: torch.Tensor, micro_batch: PackedMicroBatch) -> torch.Tensor:
        """What a loss is made of: logprobs of the next tokens, [T]; of a model with a head its values, [B, K]. Both float32."""
        if self.model.head.is_language_model:
            return self._next_token_logprobs(logits, micro_batch)
        from actors.megatron.head import last_token_values

        return last_token_values(logits, micro_batch.batch.cu_seqlens)

    def _next_token_logprobs(self, logits: torch.Tensor, micro_batch: PackedMicroBatch) -> torch.Tensor:
        """[1, T, V / tensor ranks] -> [T] float32."""
        from actors.megatron.logprobs import next_token_logprobs

        return next_token_logprobs(
            logits,
            micro_batch.batch.labels,
            temperature=self.config.temperature if self.config.task == "grpo" else 1.0,
            vocab_size=self.model.vocab_size,
            fused=self.config.cross_entropy_loss_fusion,
        )

    def _score(self, logits: torch.Tensor, micro_batch: PackedMicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The schedule wants a loss, which nothing uses, and the logprobs [T]."""
        logprobs = self._next_token_logprobs(logits, micro_batch)
        return logprobs.sum(), logprobs
