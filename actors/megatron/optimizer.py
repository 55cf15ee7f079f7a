"""Megatron's DDP, Adam and learning-rate schedule around a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.megatron.forward_backward import sum_gradients
from actors.megatron.model import Model

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class Training:
    """The wrapped module and what updates it."""

    module: torch.nn.Module  # Megatron's DistributedDataParallel
    optimizer: Any  # megatron.core.optimizer.MegatronOptimizer
    scheduler: Any = None  # megatron.core.optimizer_param_scheduler.OptimizerParamScheduler

    def state_tensors(self) -> Iterator[torch.Tensor]:
        """What the optimizer holds beside the model: master weights, and two moments of each."""
        import torch

        weights = {weight.untyped_storage().data_ptr() for weight in self.module.parameters()}
        optimizers = [optimizer.optimizer for optimizer in self.optimizer.chained_optimizers]
        masters = [master for optimizer in optimizers for group in optimizer.param_groups for master in group["params"]]
        states = [state for optimizer in optimizers for state in optimizer.state.values()]
        moments = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        for tensor in [*masters, *moments]:
            if tensor.untyped_storage().data_ptr() not in weights:
                yield tensor

    def finish_gather(self) -> None:
        """Wait until the weights are those of the last update: with overlap_param_gather they come with the next forward pass.

        A collective of the data ranks, needed before anything but a forward pass reads or moves weights.
        """
        if self.module.use_forward_hook:
            self.module.start_param_sync(force_sync=True)

    def zero_gradients(self) -> None:
        self.module.zero_grad_buffer()
        self.optimizer.zero_grad()

    def update(self) -> tuple[float, float]:
        """One step of the optimizer and the schedule; the gradient norm before clipping and the learning rate used."""
        lr = self.optimizer.param_groups[0]["lr"]
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        return float(grad_norm), float(lr)


def learning_rate(config: Any) -> float:
    """The given one, or 1e-5 for all weights and 1e-4 for adapters."""
    if config.lr is not None:
        return config.lr
    return 1e-4 if config.tuner_type == "lora" else 1e-5


def prepare_training(model: Model, config: Any, optimizer_options: dict[str, Any], ddp_options: dict[str, Any]) -> Training:
    """Wrap the model's module and make its optimizer. The two option dicts are further fields of Megatron's configs."""
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.optimizer import ChainedOptimizer
    from megatron.core.transformer.module import Float16Module

    lower = model.dtype == torch.bfloat16
    inner = Float16Module(model.config, model.module) if lower else model.module
    names = ("use_distributed_optimizer", "overlap_param_gather")
    shared = {name: getattr(config, name) for name in names}
    reduction = {"grad_reduce_in_fp32": True, "overlap_grad_reduce": config.overlap_grad_reduce}
    ddp_config = DistributedDataParallelConfig(**(shared | reduction | ddp_options))
    module = DistributedDataParallel(model.config, ddp_config, inner)
    settings = shared | {
        "optimizer": "adam",
        "lr": learning_rate(config),
        "min_lr": config.min_lr,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "adam_eps": config.adam_eps,
        "clip_grad": config.clip_grad,
        "bf16": lower,
        "params_dtype": model.dtype,
    }
    if config.optimizer_cpu_offload:  # Megatron's HybridDeviceOptimizer; master weights are its own, hence the second name
        settings |= {"optimizer_cpu_offload": True, "use_precision_aware_optimizer": True}
        settings |= {"optimizer_offload_fraction": config.optimizer_offload_fraction}
    optimizer = get_megatron_optimizer(OptimizerConfig(**(settings | optimizer_options)), [module])
    if not isinstance(optimizer, ChainedOptimizer):  # alone it does not measure the gradient norm when clip_grad is 0
        optimizer = ChainedOptimizer([optimizer])
    _make_moments(optimizer)
    model.config.grad_scale_func = optimizer.scale_loss
    model.config.finalize_model_grads_func = sum_gradients
    if ddp_config.overlap_grad_reduce:
        model.config.no_sync_func = module.no_sync
    return Training(module=module, optimizer=optimizer)


def _make_moments(optimizer: Any) -> None:
    """Zeros. Made by the first step they would lie among activations, and torch could not give back the memory around them.

    Those of `optimizer_cpu_offload` come with the first step: most of them are in host memory.
    """
    import torch

    for part in optimizer.chained_optimizers:
        if part.init_state_fn is None:
            continue
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.AdamW):  # on a CPU: it counts the steps of each parameter
            for state in part.optimizer.state.values():
                state["step"] = torch.tensor(0.0)


def make_scheduler(optimizer: Any, config: Any, total_steps: int) -> Any:
    """Megatron's schedule over `total_steps` optimizer steps: linear warm-up, then `lr_decay_style` down to `min_lr`.

    As in Megatron the first step of a warm-up has learning rate 0. Raises ValueError when the warm-up is not shorter.
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    warmup = config.lr_warmup_iters
    if config.lr_warmup_fraction is not None:
        warmup = config.lr_warmup_fraction * total_steps
    lr = learning_rate(config)
    if warmup >= total_steps:
        raise ValueError(f"the warm-up of {warmup:g} steps is not shorter than the run of {total_steps} steps")
    if config.min_lr > lr:
        raise ValueError(f"min_lr {config.min_lr:g} is above lr {lr:g}")
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=total_steps,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
