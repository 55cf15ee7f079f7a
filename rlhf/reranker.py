"""Rerankers, by a head of one score or by the logits of two words: next queries with their documents, update."""

from __future__ import annotations

from functools import partial
from typing import Any

from rlhf.batching import row_shards
from rlhf.config import Config
from rlhf.data import RowBatch
from rlhf.head_losses import reranker_loss
from rlhf.roles import Roles
from rlhf.supervised import Update, train_on_rows
from rlhf.variables import variable


def train_reranker(config: Config, roles: Roles, **run: Any) -> None:
    """The loss is the mean over the documents or groups of a global batch; `run` as in `train_on_rows`."""
    least = variable(config, "LISTWISE_RERANKER_MIN_GROUP_SIZE")

    def prepare(batch: RowBatch, training: bool) -> Update:
        sizes = group_sizes(batch)
        loss = partial(
            reranker_loss,
            loss_type=config.loss_type,
            num_documents=sum(sizes),
            num_groups=len(sizes),
            num_trained_groups=sum(size >= least for size in sizes),
            temperature=variable(config, "LISTWISE_RERANKER_TEMPERATURE"),
            min_group_size=least,
        )
        return Update(shards=row_shards(batch, config, data_size=roles.policy.data_size, weigh="rows"), loss=loss)

    train_on_rows(config, roles, prepare, **run)


def group_sizes(batch: RowBatch) -> list[int]:
    """Documents of each group: the relevant one, with which it begins, and the others."""
    sizes: list[int] = []
    for sequence in batch.sequences:
        if batch.summary.targets[sequence][0] == 1:
            sizes.append(0)
        sizes[-1] += 1
    return sizes
