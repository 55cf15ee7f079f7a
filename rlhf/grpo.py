"""GRPO: push weights, sample, score, advantages, pack, logprobs, update, log, save."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import ray

from actors.group import RankGroup
from rlhf.advantages import group_advantages, has_signal
from rlhf.batching import group_shards
from rlhf.checkpoint import Checkpoints
from rlhf.config import Config
from rlhf.counts import updates
from rlhf.group_metrics import group_metrics
from rlhf.losses import grpo_loss
from rlhf.metrics import RunLog
from rlhf.records import Group, Score
from rlhf.roles import Roles

Scored = list[tuple[Group, Score]]


def train_grpo(config: Config, roles: Roles, *, log: RunLog, checkpoints: Checkpoints, start: int, total: int) -> None:
    """Optimizer steps `start` to `total`; one generation batch serves steps_per_generation x num_iterations of them."""
    policy, rollout = roles.policy, roles.rollout
    loss = grpo_loss_of(config)
    shared = updates(config)
    assert start % shared == total % shared == 0, (start, total, shared)
    for step in range(start, total, shared):
        rollout.push(policy)
        scored = sample(config, roles, step)
        groups = [group for group, _ in scored]
        reference = reference_logprobs(config, roles, groups)
        kl_in_reward = config.kl_in_reward and reference is not None
        old = response_logprobs(policy, groups, config) if shared > 1 or kl_in_reward else None
        kl = response_kl(groups, old, reference) if kl_in_reward else None
        advantages = group_advantages(
            [score.rewards for _, score in scored],
            estimator=config.advantage_estimator,
            scale=config.scale_rewards,
            kl=kl,
            beta=config.beta,
        )
        batches = group_shards(groups, advantages, config, data_size=policy.data_size, seed=config.seed + step)
        results = [
            policy.on_shards("train_step", shards, loss, old, reference)[0]
            for _ in range(config.num_iterations)
            for shards in batches
        ]
        step += shared
        metrics = group_metrics(scored) | {"kl": None} | over_updates(results) | rollout.metrics()
        log.step(step, metrics | {"epoch": roles.data.epoch}, scored)
        checkpoints.save_if_due(step, policy, roles.data.state() | {"weight_version": rollout.version})


def sample(config: Config, roles: Roles, step: int) -> Scored:
    """One generation batch of scored groups. `dynamic_sample` replaces groups without signal by groups of further prompts."""
    count = config.generation_batch_size // config.num_generations
    kept: Scored = []
    spare: Scored = []
    for _ in range(1 + (config.max_resample_times if config.dynamic_sample else 0)):
        prompts = roles.data.next_batch(count)
        groups = roles.rollout.generate(prompts, n=config.num_generations)
        for group, score in roles.scorer.score(groups, step):
            wanted = not config.dynamic_sample or has_signal(score.rewards)
            (kept if wanted else spare).append((group, score))
        if len(kept) >= count:
            break
    return (kept + spare)[:count]


def grpo_loss_of(config: Config) -> Any:
    """The loss with its options bound."""
    return partial(
        grpo_loss,
        loss_type=config.loss_type,
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
        delta=config.delta,
        beta=0.0 if config.kl_in_reward else config.beta,
        importance_sampling_level=config.importance_sampling_level,
        rollout_importance_sampling_mode=config.rollout_importance_sampling_mode,
        rollout_importance_sampling_threshold=config.rollout_importance_sampling_threshold,
    )


def reference_logprobs(config: Config, roles: Roles, groups: Sequence[Group]) -> list[ray.ObjectRef] | None:
    """Logprobs under the reference: its own group, or the policy with its adapter disabled; None when beta is 0."""
    if not config.beta:
        return None
    if roles.reference is not None:
        return response_logprobs(roles.reference, groups, config)
    return response_logprobs(roles.policy, groups, config, without_adapter=True)


def response_logprobs(
    ranks: RankGroup, groups: Sequence[Group], config: Config, *, without_adapter: bool = False
) -> list[ray.ObjectRef]:
    """References to {key: logprobs [L]} that together cover every response."""
    nothing = [[None] * len(group.texts) for group in groups]
    shards = group_shards(groups, nothing, config, data_size=ranks.data_size, seed=0, steps=1)[0]
    return ranks.on_shards_refs("logprobs", shards, without_adapter)


def response_kl(groups: Sequence[Group], old: list[ray.ObjectRef], reference: list[ray.ObjectRef]) -> list[list[float]]:
    """KL of the policy from the reference (k1: sum over a response of old - reference), [groups][responses]."""
    policy, ref = _merged(old), _merged(reference)
    sums, key = [], 0
    for group in groups:
        sums.append([])
        for length in group.response_lengths:
            sums[-1].append(float(np.sum(policy[key][-length:] - ref[key][-length:])) if length else 0.0)
            key += 1
    return sums


def over_updates(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """One value a metric over the updates of a generation batch: the mean; "max_": the largest; lr: the last."""
    merged = {}
    for name in results[-1]:
        values = [result[name] for result in results]
        merged[name] = max(values) if name.startswith("max_") else values[-1] if name == "lr" else fmean(values)
    return merged


def _merged(refs: list[ray.ObjectRef]) -> dict[int, np.ndarray]:
    return {key: logprobs for part in ray.get(refs) for key, logprobs in part.items()}
