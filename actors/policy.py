"""A Megatron rank that trains: one actor for each, the group of them holds the policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from actors.device_memory import peak_gib
from actors.megatron.rank import MegatronRank
from rlhf.heads import head_of
from rlhf.records import MicroBatch, PushReport, RankInfo, Shard

if TYPE_CHECKING:
    import torch
    from ray import ObjectRef
    from ray.actor import ActorHandle

    from actors.megatron.micro_batch import PackedMicroBatch
    from actors.megatron.optimizer import Training
    from actors.weights.transport import Transport

    # From the outputs of a micro batch (logprobs [T], gkd: where they have a use; or what a head gives, [B, K]): its share of the
    # loss of the global batch, and its share of metrics.
    Loss = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


class Policy(MegatronRank):
    """The model that is trained. Methods are collectives: the controller calls them on every rank."""

    training: Training

    def setup(self, master: str) -> RankInfo:
        """Join the group at `master`, build the model, its adapter if asked, and the optimizer."""
        config = self.config
        with self.doing("setup"):
            self._start(master, head=head_of(config))
            from actors.megatron.lora import add_adapter
            from actors.megatron.offload import Offload
            from actors.megatron.optimizer import prepare_training

            if config.tuner_type == "lora":
                add_adapter(self.model, config)
            self.training = prepare_training(self.model, config, self.optimizer_options, self.ddp_options)
            self.module = self.training.module
            self.optimizer_state = Offload(self.platform)
            self.step = 0
            if config.train_iters is not None and config.num_train_epochs is None:
                self.schedule(config.train_iters)
            return self._info()

    def schedule(self, total_steps: int) -> None:
        """Start the learning-rate schedule of a run of so many optimizer steps; needed when the dataset decides their number."""
        from actors.megatron.optimizer import make_scheduler

        self.training.scheduler = make_scheduler(self.training.optimizer, self.config, total_steps)

    def train_step(
        self,
        shard: Shard,
        loss: Loss,
        old: list[ObjectRef] | None = None,
        ref: list[ObjectRef] | None = None,
        batch_values: list[ObjectRef] | None = None,
        teacher: list[ObjectRef] | None = None,
    ) -> dict[str, float] | None:
        """One optimizer step on the shards of all data ranks.

        `old` and `ref` are results of `logprobs`, `batch_values` of `sequence_values`, `teacher` of `token_logits`. Metrics
        are the same on every rank that returns some: those of `loss` (sums over micro batches and data ranks; names that start
        with max_ are maxima), loss, grad_norm, lr, where there are rollout logprobs their mean and maximal difference from the
        policy's and the `entropy`, and on GPUs the most memory in use on any since the last step. Raises FloatingPointError when
        the loss or the gradient norm is not finite.
        """
        from actors.megatron.metrics import largest_of_ranks
        from actors.megatron.parallel import returns_results
        from actors.megatron.router_losses import read_router_losses

        assert self.training.scheduler is not None, "schedule(total_steps) was not called"
        with self.doing(f"train_step {self.step + 1}"):
            self.training.zero_gradients()
            batches = self._packed(shard, old, ref, batch_values)
            metrics = self._run(batches, loss, teacher, backward=True)
            grad_norm, lr = self.training.update()
            self.step += 1
            metrics |= read_router_losses(self.model.config, len(batches), self.platform.device)
            metrics |= {"grad_norm": grad_norm, "lr": lr}
            if (peak := peak_gib()) is not None:
                metrics["max_gpu_gib_train"] = largest_of_ranks(peak, self.platform.device)
            broken = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics.get(name, 0.0))]
            if broken:
                values = ", ".join(f"{name} {metrics[name]}" for name in broken)
                raise FloatingPointError(f"optimizer step {self.step}, policy rank {self.rank}: {values}")
            return metrics if returns_results() else None

    def evaluate(
        self,
        shard: Shard,
        loss: Loss,
        old: list[ObjectRef] | None = None,
        ref: list[ObjectRef] | None = None,
        batch_values: list[ObjectRef] | None = None,
        teacher: list[ObjectRef] | None = None,
    ) -> dict[str, float] | None:
        """The metrics that `train_step` would give of these shards' loss, with the weights as they are."""
        from actors.megatron.parallel import returns_results

        with self.doing(f"evaluate after step {self.step}"):
            metrics = self._run(self._packed(shard, old, ref, batch_values), loss, teacher, backward=False)
            return metrics if returns_results() else None

    def _run(
        self, batches: list[PackedMicroBatch], loss: Loss, teacher: list[ObjectRef] | None, *, backward: bool
    ) -> dict[str, float]:
        """The metrics of the global batch; none but on the last pipeline stage."""
        from actors.megatron.distillation import Comparison
        from actors.megatron.forward_backward import run_micro_batches
        from actors.megatron.metrics import of_sampled_tokens, reduce_metrics

        def output_loss(logits: torch.Tensor, micro_batch: PackedMicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            if comparison is None:
                outputs = self._outputs(logits, micro_batch)
            else:
                outputs, micro_batch = comparison.compare(logits, micro_batch)
            value, metrics = loss(outputs, micro_batch.batch)
            return value, metrics | {"loss": value.detach()} | of_sampled_tokens(outputs, micro_batch)

        comparison = None
        if teacher is not None:
            comparison = Comparison(self.config, teacher, vocab_size=self.model.vocab_size)
        by_micro_batch = run_micro_batches(self.module, batches, output_loss, backward=backward)
        return reduce_metrics(by_micro_batch) if by_micro_batch else {}

    @cached_property
    def transport(self) -> Transport:
        """How weights get to this rank's engines: kept, since it may hold a group of processes."""
        width = self.config.vllm_tensor_parallel_size
        return self.platform.transport(shared_device=self.config.vllm_mode == "colocate", width=width)

    def push_weights(self, engines: dict[int, ActorHandle], version: int) -> PushReport | None:
        """Send all weights, the adapter merged in, as `version` to this rank's rollout engines {index: actor}.

        Every rank takes part in gathering the weights; one without engines returns None.
        """
        from actors.megatron.lora import adapter_merged
        from actors.weights.push import push_weights

        with self.doing(f"push_weights {version}"):
            self.training.finish_gather()
            with adapter_merged(self.model):
                tensors = self.model.export_weights()
                if engines:
                    timeout = self.config.push_timeout
                    report = push_weights(tensors, engines, version, timeout=timeout, transport=self.transport)
                    return replace(report, gpu_gib=peak_gib())
                for _ in tensors:
                    pass
                return None

    def offload(self, weights: bool) -> None:
        """Gradients are dropped; the optimizer's state leaves with `offload_optimizer`."""
        self.training.finish_gather()
        self.training.module.offload_grad_buffers(empty_cache=False)
        if self.config.offload_optimizer:
            self.optimizer_state.leave(self.training.state_tensors())
        super().offload(weights)

    def come_back(self) -> None:
        """Undo `offload`; gradients are zero."""
        super().come_back()
        self.optimizer_state.come_back()
        self.training.module.restore_grad_buffers()

    def save(self, folder: str, step: int) -> None:
        """Write what training needs to go on into `folder`/mcore, and the model for transformers and vLLM into `folder`."""
        from actors.megatron.checkpoint import save_description, save_for_inference, save_state

        config, target = self.config, Path(folder)
        with self.doing(f"save {step}"):
            self.training.finish_gather()
            if config.save_safetensors:
                merge = config.save_safetensors if config.merge_lora is None else config.merge_lora
                save_for_inference(self.model, target, rank=self.rank, merge=merge)
            elif self.rank == 0 and not self.model.has_adapter:
                save_description(self.model, target)
            save_state(
                self.model,
                self.training,
                target,
                step=step,
                optimizer=not config.no_save_optim,
                rng=not config.no_save_rng,
            )

    def load(self, folder: str) -> int:
        """Restore what `save` wrote, under this or another layout of ranks; returns the step it was written at."""
        from actors.megatron.checkpoint import load_state

        with self.doing("load"):
            self.training.finish_gather()
            kept = {"optimizer": not self.config.no_load_optim, "rng": not self.config.no_load_rng}
            self.step = load_state(self.model, self.training, Path(folder), **kept)
            return self.step
