"""One step of a loop around real ranks, its gradients kept: they may not depend on how the batch is split.

In float32 a model's own matrix products, whose order of summation follows the length of a micro batch, change the gradients of
a loss that is linear in the logprobs by up to 1e-6 of the largest. In float64 they change them by 1e-15, and what is left is the
losses, which compute on float32 logprobs, scores and embeddings as ever (distillation on float64 logits), and the sums over
micro batches and ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from rlhf.data import RowBatch
from tests.policy_ranks import Group, largest_difference

FLOAT64: dict[str, Any] = {  # options of a policy that computes and keeps its gradients so
    "torch_dtype": "float64",
    "megatron": {"grad_reduce_in_fp32": False},
    "use_distributed_optimizer": False,
}
SPLIT_BAR = 1e-6  # of the largest gradient


def assert_same_gradients(steps: Iterable[dict[str, np.ndarray]]) -> None:
    """Of the same batch, split in different ways: {parameter: gradient in float64} each."""
    first, *others = steps
    assert others and {gradient.dtype for step in (first, *others) for gradient in step.values()} == {np.dtype(np.float64)}
    largest = max(np.abs(gradient).max() for gradient in first.values())
    assert largest > 1e-3
    for other in others:
        assert largest_difference(other, first) <= SPLIT_BAR * largest


class OneStep:
    """Stands for the roles of a loop around real ranks: one batch, whose gradients are kept instead of an update."""

    epoch, evaluation_rows, reference = 0.0, 0, None

    def __init__(self, ranks: Group, batch: RowBatch):
        self.ranks, self.batch, self.data_size, self.restored = ranks, batch, ranks.data_size, {}
        self.policy = self.data = self

    def next_batch(self, count: int) -> RowBatch:
        assert count == len(self.batch.summary.units), "global_batch_size counts rows, or packs of them"
        return self.batch

    def on_shards_refs(self, *arguments: Any) -> list[Any]:
        return self.ranks.on_shards_refs(*arguments)

    def on_shards(self, method: str, shards: list[Any], loss: Any, *batch: Any) -> list[dict[str, float]]:
        self.split = [[len(micro_batch) for micro_batch in shard.micro_batches] for shard in shards]  # sequences, by data rank
        self.metrics = self.ranks.on_shards("evaluate", shards, loss, *batch)[0]
        self.gradients = self.ranks.gradients(shards, loss, *batch)
        return [self.metrics]

    def gradient_norm(self) -> float:
        return float(np.sqrt(sum((gradient**2).sum() for gradient in self.gradients.values())))

    def state(self) -> dict[str, Any]:
        return {}

    def step(self, *_: Any) -> None:
        pass

    def save_if_due(self, *_: Any) -> None:
        pass
