"""Supervised fine-tuning: next batch, pack, update, log, save."""

from __future__ import annotations

from rlhf.batching import row_shards
from rlhf.checkpoint import Checkpoints
from rlhf.cluster import Roles
from rlhf.config import Config
from rlhf.losses import sft_loss
from rlhf.metrics import RunLog


def train_sft(config: Config, roles: Roles, *, log: RunLog, checkpoints: Checkpoints, start: int, total: int) -> None:
    """Optimizer steps `start` to `total`."""
    for step in range(start, total):
        batch = roles.data.next_batch(config.global_batch_size)
        shards = row_shards(batch, config, data_size=roles.policy.data_size)
        metrics = roles.policy.on_shards("train_step", shards, sft_loss, None, None)[0]
        log.step(step + 1, metrics | {"tokens": sum(batch.lengths)})
        checkpoints.save_if_due(step + 1, roles.policy, roles.data.state())
