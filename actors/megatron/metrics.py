"""Metrics of one optimizer step, from the micro batches of all data ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.megatron.micro_batch import PackedMicroBatch

if TYPE_CHECKING:
    import torch

MAXIMUM = "max_"  # names that start so take the maximum, all others the sum
DIFF, ENTROPY, COUNT = "rollout_train_logprob_diff", "entropy", "_response_tokens"


def of_sampled_tokens(logprobs: torch.Tensor, micro_batch: PackedMicroBatch) -> dict[str, torch.Tensor]:
    """Sums over response tokens: how far the rollout engine's logprobs are from the policy's with the same weights, and -logprob.

    The mean of the latter estimates the entropy of what was sampled from, before top-p and top-k, in nats. After the first
    update of a generation batch the policy has moved on: its old logprobs are taken then.
    """
    batch = micro_batch.batch
    if batch.rollout_logprobs is None:
        return {}
    trained = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    sampled = batch.loss_mask > 0
    difference = (batch.rollout_logprobs - trained).abs() * sampled
    entropy = -(trained * sampled).sum()
    return {DIFF: difference.sum(), MAXIMUM + DIFF: difference.max(), ENTROPY: entropy, COUNT: sampled.sum()}


def reduce_metrics(micro_batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Sums and maxima over micro batches and data ranks, a collective of the data ranks; the same on each of them."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    names = sorted({name for metrics in micro_batches for name in metrics})
    device = next(iter(micro_batches[0].values())).device
    zero = torch.zeros((), dtype=torch.float64, device=device)
    rows = [torch.stack([metrics.get(name, zero).detach().double() for name in names]) for metrics in micro_batches]
    is_maximum = torch.tensor([name.startswith(MAXIMUM) for name in names], device=device)
    local = _combined(torch.stack(rows), is_maximum)
    size = parallel_state.get_data_parallel_world_size()
    gathered = [torch.empty_like(local) for _ in range(size)]
    dist.all_gather(gathered, local, group=parallel_state.get_data_parallel_group())
    result = dict(zip(names, _combined(torch.stack(gathered), is_maximum).tolist()))
    if COUNT in result:
        count = max(result.pop(COUNT), 1)
        result |= {name: result[name] / count for name in (DIFF, ENTROPY)}
    return result


def largest_of_ranks(value: float, device: torch.device) -> float:
    """The largest value that any rank gives, a collective of all ranks."""
    import torch
    import torch.distributed as dist

    values = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.item()


def _combined(rows: torch.Tensor, is_maximum: torch.Tensor) -> torch.Tensor:
    """[n, metrics] -> [metrics]."""
    import torch

    return torch.where(is_maximum, rows.amax(0), rows.sum(0))
