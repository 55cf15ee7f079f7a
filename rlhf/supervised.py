"""What every loop on dataset rows shares: next batch, update, evaluate, log, save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray

from rlhf.batching import row_shards
from rlhf.checkpoint import Checkpoints
from rlhf.config import Config
from rlhf.counts import compares
from rlhf.data import RowBatch
from rlhf.metrics import RunLog
from rlhf.records import Group, Score, Shard
from rlhf.roles import Roles


@dataclass(frozen=True, kw_only=True)
class Update:
    """What `train_step` or `evaluate` is called with."""

    shards: list[Shard]
    loss: Callable[..., Any]
    ref: list[ray.ObjectRef] | None = None  # the reference's logprobs
    batch_values: list[ray.ObjectRef] | None = None  # of every sequence of the global batch
    teacher: list[ray.ObjectRef] | None = None  # the teacher's logits
    metrics: dict[str, float] = field(default_factory=dict)  # what is known beside those of the loss
    sampled: list[tuple[Group, Score]] | None = None  # the responses, when they are not the rows'

    def run(self, method: str, roles: Roles) -> dict[str, float]:
        """The metrics of `train_step` or `evaluate`."""
        arguments = self.shards, self.loss, None, self.ref, self.batch_values, self.teacher
        return roles.policy.on_shards(method, *arguments)[0] | self.metrics


@dataclass(frozen=True, kw_only=True)
class InParts:
    """Held-out rows that are prepared and evaluated one part after another; every metric is a mean over trained tokens."""

    parts: list[RowBatch]
    prepare: Callable[[RowBatch], Update]

    def run(self, method: str, roles: Roles) -> dict[str, float]:
        """The metrics of all parts together."""
        total = sum(part.trained_tokens for part in self.parts)
        metrics: dict[str, float] = {}
        for part in self.parts:
            for name, value in self.prepare(part).run(method, roles).items():
                metrics[name] = metrics.get(name, 0.0) + value * part.trained_tokens / total
        return metrics


Prepare = Callable[[RowBatch, bool], Any]  # of a batch, to train on it or to evaluate: an Update, or InParts


def train_on_rows(
    config: Config,
    roles: Roles,
    prepare: Prepare,
    *,
    log: RunLog,
    checkpoints: Checkpoints,
    start: int,
    total: int,
    state: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Optimizer steps `start` to `total`; `state` gives what a checkpoint keeps beside the data's position.

    The held-out rows are evaluated before the first step, every `eval_steps`, and after the last.
    """
    if start == 0:
        evaluate(config, roles, prepare, log, step=0)
    for step in range(start + 1, total + 1):
        batch = roles.data.next_batch(config.global_batch_size)
        train(roles, prepare, batch, log, step)
        if step % config.eval_steps == 0 or step == total:
            evaluate(config, roles, prepare, log, step=step)
        checkpoints.save_if_due(step, roles.policy, roles.data.state() | state())


def train(roles: Roles, prepare: Prepare, batch: RowBatch, log: RunLog, step: int) -> None:
    """Update and log. What the update refers to ends here: the next step's logits of a teacher need its room."""
    update = prepare(batch, True)
    metrics = {"tokens": batch.num_tokens} | update.run("train_step", roles) | {"epoch": roles.data.epoch}
    log.step(step, metrics, update.sampled)


def evaluate(config: Config, roles: Roles, prepare: Prepare, log: RunLog, *, step: int) -> None:
    """Metrics of the held-out rows, or of the first `eval_iters` global batches of them, as one batch."""
    count = roles.data.evaluation_rows
    if config.eval_iters >= 0:
        count = min(count, config.eval_iters * config.global_batch_size)
    if count:
        update = prepare(roles.data.evaluation_batch(count), False)
        log.evaluation(step, update.run("evaluate", roles))


def reference_logprobs(config: Config, roles: Roles, batch: RowBatch) -> list[ray.ObjectRef] | None:
    """Logprobs under the reference: its own group, or the policy with its adapter disabled; None when none is compared with."""
    if not compares(config):
        return None
    ranks = roles.reference or roles.policy
    shards = row_shards(batch, config, data_size=ranks.data_size, weigh="rows")
    return ranks.on_shards_refs("logprobs", shards, roles.reference is None)


def merged(refs: list[ray.ObjectRef]) -> dict[int, Any]:
    """The ranks' results of `logprobs` or `sequence_values`, by sequence key."""
    return {key: value for part in ray.get(refs) for key, value in part.items()}
