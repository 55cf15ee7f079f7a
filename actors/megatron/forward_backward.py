"""Micro batches through Megatron's schedules.

The loss of a micro batch is its share of the loss of the global batch. So gradients are to be added, over micro batches and
over data ranks, and never averaged. `calculate_per_token_loss` in the model config makes Megatron add: its schedules leave
a loss that comes with a token count as it is, and its DDP does not divide by the number of data ranks, neither at the end nor
in the backward hooks (`overlap_grad_reduce`). What remains is its division of the summed gradients by the token count, which
`sum_gradients` leaves out; router_losses.py makes up for it where Megatron counts on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from actors.megatron.micro_batch import PackedMicroBatch
from actors.megatron.router_losses import router_losses_averaged

if TYPE_CHECKING:
    import torch

# From the model's output on the last stage: the loss, and what is wanted back for this micro batch.
OutputLoss = Callable[["torch.Tensor", PackedMicroBatch], tuple["torch.Tensor", Any]]


def run_micro_batches(
    module: torch.nn.Module, micro_batches: list[PackedMicroBatch], output_loss: OutputLoss, *, backward: bool
) -> list[Any]:
    """What `output_loss` gave for each micro batch; an empty list unless this is the last pipeline stage."""
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    module.train(backward)
    averaged = router_losses_averaged(get_model_config(module), micro_batches) if backward else nullcontext()
    with torch.set_grad_enabled(backward), averaged:
        return get_forward_backward_func()(
            forward_step_func=partial(_forward_step, output_loss),
            data_iterator=iter(micro_batches),
            model=module,
            num_microbatches=len(micro_batches),
            seq_length=max(len(micro_batch.batch.token_ids) for micro_batch in micro_batches),
            micro_batch_size=1,
            forward_only=not backward,
        )


def sum_gradients(chunks: list[Any], num_tokens: torch.Tensor | None = None, **groups: Any) -> None:
    """Megatron's `finalize_model_grads` without a division: gradients become sums over the data ranks."""
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(chunks, None, **groups)


def _forward_step(output_loss: OutputLoss, batches: Iterator[PackedMicroBatch], module: torch.nn.Module) -> tuple[Any, Any]:
    micro_batch = next(batches)
    output = module(**micro_batch.model_inputs())
    return output, partial(_summed, output_loss, micro_batch)


def _summed(output_loss: OutputLoss, micro_batch: PackedMicroBatch, output: torch.Tensor) -> tuple[Any, Any, Any]:
    """The three values that Megatron's schedules take as a loss that is to be added, not averaged."""
    import torch

    loss, wanted = output_loss(output, micro_batch)
    return loss, torch.zeros([], dtype=torch.int, device=output.device), wanted
