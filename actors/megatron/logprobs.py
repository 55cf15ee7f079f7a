"""Logprobs of the next tokens from logits whose vocabulary is split over the tensor ranks."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def next_token_logprobs(
    logits: torch.Tensor, labels: torch.Tensor, *, temperature: float, vocab_size: int, fused: bool
) -> torch.Tensor:
    """log softmax(logits / temperature) at the labels: [1, T, V / tensor ranks], [T] int64 -> [T] float32.

    Overwrites float32 logits. `vocab_size` is V without the columns that pad it for tensor parallelism. `fused` takes
    Megatron's fused kernel, which talks to the other tensor ranks twice instead of three times.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    scores = logits.float()
    if temperature != 1:
        scores = scores.div_(temperature)  # before the row is taken: of a view, autograd would keep two more copies
    scores = scores.squeeze(0)
    columns = scores.shape[-1]
    valid = vocab_size - parallel_state.get_tensor_model_parallel_rank() * columns
    if valid < columns:
        scores = scores.clone()
        scores[:, max(valid, 0) :] = float("-inf")
    if not fused:
        return -vocab_parallel_cross_entropy(scores, labels)
    return -_fused_cross_entropy().apply(scores, labels, parallel_state.get_tensor_model_parallel_group())


@cache
def _fused_cross_entropy() -> Any:
    """Megatron's fused cross entropy, without the rounding of every gradient to bfloat16 in its backward."""
    from megatron.core.fusions.fused_cross_entropy import _VocabParallelCrossEntropy
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

    class FusedCrossEntropy(_VocabParallelCrossEntropy):
        @staticmethod
        def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None]:
            softmax, target_mask, masked_target = ctx.saved_tensors
            operands = VocabParallelCrossEntropy.prepare_gradient_calculation_operands(softmax, target_mask)
            grad_2d, arange, softmax_update, grad_input = operands
            grad_input = VocabParallelCrossEntropy.calculate_gradients(
                grad_2d, arange, masked_target, softmax_update, grad_input, grad_output
            )
            return grad_input, None, None

    return FusedCrossEntropy
