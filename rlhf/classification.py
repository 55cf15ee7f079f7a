"""Sequence classification and regression: next rows, update."""

from __future__ import annotations

from functools import partial
from typing import Any

from rlhf.batching import row_shards
from rlhf.config import Config
from rlhf.data import RowBatch
from rlhf.head_losses import classification_loss
from rlhf.roles import Roles
from rlhf.supervised import Update, train_on_rows


def train_classification(config: Config, roles: Roles, **run: Any) -> None:
    """The loss is the mean over the rows of a global batch; `run` as in `train_on_rows`."""
    loss = partial(classification_loss, problem_type=config.problem_type)

    def prepare(batch: RowBatch, training: bool) -> Update:
        return Update(shards=row_shards(batch, config, data_size=roles.policy.data_size, weigh="rows"), loss=loss)

    train_on_rows(config, roles, prepare, **run)
