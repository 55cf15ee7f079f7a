"""Generalized knowledge distillation: next rows, or the policy's own responses to their prompts; teacher's logits, update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import ray

from rlhf.batching import response_shards, row_shards
from rlhf.config import Config
from rlhf.data import RowBatch
from rlhf.losses import gkd_loss
from rlhf.model_folder import excess_ids, read_shape
from rlhf.records import Group, Score, Shard
from rlhf.roles import Roles
from rlhf.supervised import InParts, Update, train_on_rows

UNSCORED = Score(rewards=(None,), by_function={})
SplitOver = Callable[..., list[Shard]]  # of a batch, over `data_size` ranks


def train_gkd(config: Config, roles: Roles, **run: Any) -> None:
    """The loss is the mean over the trained tokens of a global batch; `run` as in `train_on_rows`."""

    def prepare(batch: RowBatch, training: bool) -> Update | InParts:
        if not training:
            return InParts(parts=batch.parts(config.global_batch_size), prepare=on_rows)
        if is_on_policy(config, batch.position):
            groups = sample(config, roles, batch)
            update = distil(config, roles, partial(response_shards, groups, config), gkd_loss)
            metrics = on_policy_metrics(groups) | roles.rollout.metrics()
            return replace(update, metrics=metrics, sampled=[(group, UNSCORED) for group in groups])
        return replace(on_rows(batch), metrics={"on_policy": 0})

    def on_rows(batch: RowBatch) -> Update:
        loss = partial(gkd_loss, sft_alpha=config.sft_alpha)
        return distil(config, roles, partial(row_shards, batch, config, weigh="tokens"), loss)

    version = (lambda: {"weight_version": roles.rollout.version}) if roles.rollout else dict
    train_on_rows(config, roles, prepare, state=version, **run)


def is_on_policy(config: Config, position: int) -> bool:
    """One draw a step, by the seed and the position of the step's rows."""
    return np.random.default_rng([config.seed, position]).random() < config.lmbda


def sample(config: Config, roles: Roles, batch: RowBatch) -> list[Group]:
    """The policy's response to the prompt of every row, in the order of the rows, of tokens that the teacher has too."""
    roles.rollout.push(roles.policy)
    unknown = excess_ids(config.model, config.teacher.model)
    groups = roles.rollout.generate(ray.get(batch.prompts), n=1, sampling={"excluded_ids": unknown})
    return sorted(groups, key=lambda group: group.prompt.index)


def distil(config: Config, roles: Roles, split_over: SplitOver, loss: Callable[..., Any]) -> Update:
    """The update towards the teacher's logits: of its own group, or of the policy with its adapter disabled."""
    ranks = roles.teacher or roles.policy
    tokens = min(read_shape(Path(folder)).vocab_size for folder in (config.model, config.teacher.model))
    shards = split_over(data_size=ranks.data_size)
    teacher = ranks.every_rank_refs("token_logits", shards, tokens, config.gkd_logits_topk, roles.teacher is None)
    return Update(shards=split_over(data_size=roles.policy.data_size), loss=loss, teacher=teacher)


def on_policy_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Of one response a prompt; `tokens` counts prompts too."""
    lengths = [group.response_lengths[0] for group in groups]
    return {
        "on_policy": 1,
        "response_length": fmean(lengths),
        "response_tokens": sum(lengths),
        "cut_off": fmean(group.finish_reasons[0] == "length" for group in groups),
        "tokens": sum(lengths) + sum(len(group.prompt.token_ids) for group in groups),
    }
