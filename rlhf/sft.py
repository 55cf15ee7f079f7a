"""Pre-training and supervised fine-tuning: next batch, pack, update."""

from __future__ import annotations

from typing import Any

from rlhf.batching import row_shards
from rlhf.config import Config
from rlhf.data import RowBatch
from rlhf.losses import sft_loss
from rlhf.roles import Roles
from rlhf.supervised import Update, train_on_rows


def train_sft(config: Config, roles: Roles, **run: Any) -> None:
    """The loss is the mean over the trained tokens of a global batch; `run` as in `train_on_rows`."""

    def prepare(batch: RowBatch, training: bool) -> Update:
        return Update(shards=row_shards(batch, config, data_size=roles.policy.data_size, weigh="tokens"), loss=sft_loss)

    train_on_rows(config, roles, prepare, **run)
