"""Direct preference optimization: next pairs, reference logprobs, update."""

from __future__ import annotations

from functools import partial
from statistics import fmean
from typing import Any

from rlhf.batching import row_shards
from rlhf.checkpoint import Checkpoints
from rlhf.config import Config
from rlhf.data import RowBatch
from rlhf.losses import dpo_loss, logprob_sums
from rlhf.preference_losses import WHOLE_BATCH_LOSS_TYPES, RunningMean
from rlhf.roles import Roles
from rlhf.supervised import Update, merged, reference_logprobs, train_on_rows


def train_dpo(config: Config, roles: Roles, *, checkpoints: Checkpoints, **run: Any) -> None:
    """The loss is the mean over the pairs of a global batch; `run` as in `train_on_rows`."""
    mean = RunningMean(**checkpoints.restored.get("reward_mean", {}))

    def prepare(batch: RowBatch, training: bool) -> Update:
        nonlocal mean
        policy = roles.policy
        shards = row_shards(batch, config, data_size=policy.data_size, weigh="rows")
        ref = reference_logprobs(config, roles, batch)
        whole, moves_mean = config.loss_type in WHOLE_BATCH_LOSS_TYPES, config.loss_type == "bco_pair" and training
        sums = None
        if whole or moves_mean:
            sums = policy.on_shards_refs("sequence_values", shards, partial(logprob_sums, ld_alpha=config.ld_alpha), ref)
        if moves_mean:
            mean = mean.updated(config.beta * fmean(float(own - other) for own, other in merged(sums).values()))
        loss = partial(
            dpo_loss,
            loss_type=config.loss_type,
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            f_divergence_type=config.f_divergence_type,
            f_alpha_divergence_coef=config.f_alpha_divergence_coef,
            discopop_tau=config.discopop_tau,
            reference_free=config.reference_free,
            ld_alpha=config.ld_alpha,
            rpo_alpha=config.rpo_alpha,
            mean_chosen_length=batch.only(0).trained_tokens / batch.num_rows,
            delta=mean.mean,
        )
        return Update(shards=shards, loss=loss, ref=ref, batch_values=sums if whole else None)

    train_on_rows(config, roles, prepare, checkpoints=checkpoints, state=lambda: {"reward_mean": vars(mean)}, **run)
