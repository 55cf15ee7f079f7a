"""Kahneman-Tversky optimization: next rows, reference logprobs, the KL of mismatched pairs, update."""

from __future__ import annotations

from functools import partial
from statistics import fmean
from typing import Any

from rlhf.batching import row_shards
from rlhf.config import Config
from rlhf.data import RowBatch
from rlhf.losses import kto_loss, logprob_sums
from rlhf.roles import Roles
from rlhf.supervised import Update, merged, reference_logprobs, train_on_rows


def train_kto(config: Config, roles: Roles, **run: Any) -> None:
    """The loss is the mean over the rows of a global batch; `run` as in `train_on_rows`."""

    def prepare(batch: RowBatch, training: bool) -> Update:
        own = batch.only(0)
        kl = mismatched_kl(config, roles, batch.only(1)) if config.loss_type == "kto" else 0.0
        loss = partial(
            kto_loss,
            loss_type=config.loss_type,
            kl=kl,
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
            counts=label_counts(own),
        )
        shards = row_shards(own, config, data_size=roles.policy.data_size, weigh="rows")
        return Update(shards=shards, loss=loss, ref=reference_logprobs(config, roles, own), metrics={"kl": kl})

    train_on_rows(config, roles, prepare, **run)


def mismatched_kl(config: Config, roles: Roles, batch: RowBatch) -> float:
    """KL(policy || reference), estimated as the mean log ratio of each prompt with another prompt's response; at least 0."""
    shards = row_shards(batch, config, data_size=roles.policy.data_size, weigh="rows")
    ref = reference_logprobs(config, roles, batch)
    sums = merged(roles.policy.on_shards_refs("sequence_values", shards, logprob_sums, ref))
    return max(fmean(float(policy - reference) for policy, reference in sums.values()), 0.0)


def label_counts(batch: RowBatch) -> tuple[int, int]:
    """Desirable and undesirable rows."""
    labels = [batch.summary.targets[sequence][0] for sequence in batch.sequences]
    return int(sum(labels)), len(labels) - int(sum(labels))
