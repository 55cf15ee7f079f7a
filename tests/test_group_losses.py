"""Losses on groups of responses, by real ranks: the same however a generation is split. Their formulas: tests/test_losses.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import ray

from rlhf.advantages import group_advantages
from rlhf.batching import group_shards
from rlhf.config import Config
from rlhf.grpo import grpo_loss_of
from rlhf.records import Group, GroupTokens, Prompt
from tests.one_step import FLOAT64, assert_same_gradients
from tests.policy_ranks import hugging_face, policy_config, sequence_logprobs

GROUPS, RESPONSES = 3, 4
SPLITS = [(1, 12), (1, 6), (1, 3), (2, 6), (2, 3)]  # data ranks, responses of a micro batch: 1, 2 and 4 of them in all
LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"beta": 0.1},
    "bnpo": {"loss_type": "bnpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "gspo": {"importance_sampling_level": "sequence", "beta": 0.1},
    "gspo-token": {"importance_sampling_level": "sequence_token"},
    "two-sided": {"delta": 1.2, "advantage_estimator": "rloo"},
    "truncated": {"rollout_importance_sampling_mode": "token_truncate", "rollout_importance_sampling_threshold": 1.1},
    "masked": {"rollout_importance_sampling_mode": "sequence_mask", "rollout_importance_sampling_threshold": 1.02},
}


@pytest.fixture(scope="module")
def generation(local_ray, model):
    """Groups of random responses, one of which could not be scored; their logprobs, off by some noise, as old and reference."""
    hf, rng = hugging_face(model), np.random.default_rng(0)
    groups, rewards, logprobs = [], [], {"old": {}, "ref": {}}
    for index in range(GROUPS):
        prompt = rng.integers(3, 512, rng.integers(3, 9)).astype(np.int32)
        responses = [rng.integers(3, 512, length).astype(np.int32) for length in rng.integers(3, 20, RESPONSES)]
        rollout = []
        for item, response in enumerate(responses):
            own = sequence_logprobs(hf, np.concatenate([prompt, response])).detach().numpy()
            noise = rng.normal(0, 0.2, (3, len(own))).astype(np.float32)
            for name, off in zip(logprobs, noise):
                logprobs[name][index * RESPONSES + item] = own + off
            rollout.append((own + noise[2])[len(prompt) :])
        tokens = GroupTokens(prompt_ids=prompt, response_ids=tuple(responses), rollout_logprobs=tuple(rollout))
        group = Group(
            prompt=Prompt(index=index, token_ids=prompt, messages=[], columns={}),
            tokens=ray.put(tokens),
            texts=("",) * RESPONSES,
            finish_reasons=("stop",) * RESPONSES,
            response_lengths=tuple(map(len, responses)),
            weight_version=0,
        )
        groups.append(group)
        rewards.append([None if (index, item) == (1, 2) else float(rng.normal()) for item in range(RESPONSES)])
    return groups, rewards, [[ray.put(values)] for values in logprobs.values()]


@pytest.fixture(scope="module")
def measured(hosts, model, generation):
    """{loss: the metrics and the gradients of each split}"""
    groups, rewards, (old, ref) = generation
    found: dict[str, list[Any]] = {name: [] for name in LOSSES}
    for ranks in (1, 2):
        policy = hosts.start(policy_config(model, **FLOAT64), ranks)
        for name, count in ((name, count) for name in LOSSES for size, count in SPLITS if size == ranks):
            config = config_of(micro_batch_size=count, **LOSSES[name])
            advantages = group_advantages(rewards, estimator=config.advantage_estimator, scale=config.scale_rewards)
            (shards,) = group_shards(groups, advantages, config, data_size=ranks, seed=0)
            assert [len(shard.micro_batches) for shard in shards] == [GROUPS * RESPONSES // ranks // count] * ranks
            batch = grpo_loss_of(config), old, ref if config.beta else None
            found[name].append((policy.on_shards("evaluate", shards, *batch)[0], policy.gradients(shards, *batch)))
    return found


def config_of(**options: Any) -> Config:
    settled: dict[str, Any] = dict(
        num_generations=RESPONSES, global_batch_size=GROUPS * RESPONSES, generation_batch_size=GROUPS * RESPONSES,
        steps_per_generation=1, loss_type="grpo", beta=0.0, epsilon_high=0.2, scale_rewards="group", kl_in_reward=False,
        max_completion_length=20,
    )  # fmt: skip
    return Config(task="grpo", **(settled | options))


@pytest.mark.parametrize("name", LOSSES)
def test_metrics_and_gradients_do_not_depend_on_the_split(measured, name):
    metrics, gradients = zip(*measured[name])
    assert len(metrics) == len(SPLITS)
    for other in metrics[1:]:
        assert other == pytest.approx(metrics[0], abs=1e-6)
    assert_same_gradients(gradients)


def test_no_two_losses_are_the_same(measured):
    """Ratios are clipped and weights cut off at the bounds given here, or some losses would be others."""
    norms = [np.sqrt(sum((value**2).sum() for value in steps[0][1].values())) for steps in measured.values()]
    for i, norm in enumerate(norms):
        assert all(abs(norm / other - 1) > 1e-3 for other in norms[:i])
