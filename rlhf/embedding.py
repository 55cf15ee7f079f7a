"""Embeddings: next rows, the embeddings of the whole batch where the loss compares them, update."""

from __future__ import annotations

from functools import partial
from typing import Any

from rlhf.batching import row_shards
from rlhf.config import Config
from rlhf.data import RowBatch
from rlhf.head_losses import embedding_loss, embedding_values
from rlhf.roles import Roles
from rlhf.supervised import Update, train_on_rows
from rlhf.variables import variable

INFONCE = {  # option of the loss: variable
    "temperature": "INFONCE_TEMPERATURE",
    "mask_fake_negative": "INFONCE_MASK_FAKE_NEGATIVE",
    "fake_neg_margin": "INFONCE_FAKE_NEG_MARGIN",
    "include_qq": "INFONCE_INCLUDE_QQ",
    "include_dd": "INFONCE_INCLUDE_DD",
}


def train_embedding(config: Config, roles: Roles, **run: Any) -> None:
    """The loss is that of `embedding_loss`; `run` as in `train_on_rows`. Held-out rows are compared as one batch."""
    infonce = config.loss_type == "infonce"
    options = {name: variable(config, source) for name, source in INFONCE.items()} if infonce else {}
    in_batch = infonce and variable(config, "INFONCE_USE_BATCH")
    whole = in_batch or config.loss_type == "online_contrastive"

    def prepare(batch: RowBatch, training: bool) -> Update:
        shards = row_shards(batch, config, data_size=roles.policy.data_size, weigh="rows")
        values = None
        if whole or not training:  # held-out rows: for the recall
            values = roles.policy.on_shards_refs("sequence_values", shards, embedding_values)
        loss = partial(embedding_loss, loss_type=config.loss_type, in_batch=in_batch, mrl_dims=config.mrl_dims, **options)
        return Update(shards=shards, loss=loss, batch_values=values)

    train_on_rows(config, roles, prepare, **run)
