"""After a push an engine answers as one that loaded the saved weights, and so does the one that takes its place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from demo_command import demo
from kill_engine import kill_while_generating
from test_rollout import hugging_face, logprob_errors
from transformers import AutoTokenizer

from actors.rollout import ENVIRONMENT, RolloutEngine
from rlhf.batching import group_shards
from rlhf.cluster import Cluster
from rlhf.config import RolloutRole
from rlhf.grpo import grpo_loss_of
from rlhf.options import load_config
from rlhf.records import Group
from rlhf.roles import build_roles
from rlhf.rollout import RolloutEngines

LOGPROB_DIFF = 0.03  # mean of tokens, bfloat16


def greedy(rollout: RolloutEngines, prompts) -> dict[int, list[list[int]]]:
    groups = rollout.generate(prompts, n=1, sampling={"temperature": 0})
    return {group.prompt.index: [ids.tolist() for ids in ray.get(group.tokens).response_ids] for group in groups}


def paused_responses(groups: list[Group], old: Path, new: Path, end: int) -> int:
    """How many responses have tokens by the weights `old`, then by `new`; every logprob is to be Hugging Face's under its own.

    `end` was not to be sampled. Where a response changed over is where it fits best.
    """
    models, paused, errors = [hugging_face(folder) for folder in (old, new)], 0, []
    for group in groups:
        tokens = ray.get(group.tokens)
        for item in range(len(group.texts)):
            by_old, by_new = (logprob_errors(model, tokens, item, excluded=[end]) for model in models)
            fits = np.concatenate([[0], by_old.cumsum()]) + np.concatenate([by_new[::-1].cumsum()[::-1], [0]])
            errors.append(fits.min() / len(by_old))
            paused += min(fits[0], fits[-1]) > 4 * max(fits.min(), LOGPROB_DIFF)
    print(f"{paused} of {len(errors)} responses paused, mean error {np.mean(errors):.4f}")
    assert np.mean(errors) <= LOGPROB_DIFF
    return paused


@pytest.mark.parametrize(("mode", "engines"), [("colocate", 1), ("colocate", 2), ("server", 1)])
def test_greedy_answers_are_those_of_an_engine_that_loads_the_weights(gpu_ray, work, taught, tmp_path, mode, engines):
    options = {"lr": 1e-3, "lr_decay_style": "constant", "min_lr": 0}
    options |= {"rollout.num_engines": engines, "rollout.engines_per_device": engines}
    options |= {"vllm_max_num_seqs": 64, "vllm_max_model_len": 64}  # groups come out while others are sampled
    words = demo("rlhf", taught, work, "unused", vllm_mode=mode, deterministic="true", **options)
    config = load_config(list(map(str, words)))
    with Cluster(config, policy_ranks=1, num_engines=engines) as cluster:
        config, roles = cluster.config, build_roles(cluster, tmp_path)
        policy, rollout = roles.policy, roles.rollout
        policy.broadcast("schedule", 10)
        rollout.push(policy)
        prompts = roles.data.next_batch(64)
        before = greedy(rollout, prompts)
        groups = list(rollout.generate(prompts, n=8))
        advantages = [[1.0, -1.0] * 4 for _ in groups]
        loss, batches = grpo_loss_of(config), group_shards(groups, advantages, config, data_size=1, seed=0)
        first, *_ = [policy.on_shards("train_step", shards, loss, None, None)[0] for shards in batches]
        assert first["rollout_train_logprob_diff"] <= LOGPROB_DIFF
        policy.on_all("save", str(tmp_path), 1)
        if mode == "server":  # what is being sampled is paused by the push, and goes on
            end = AutoTokenizer.from_pretrained(taught).eos_token_id
            groups = rollout.generate(prompts, n=8, sampling={"max_completion_length": 50, "excluded_ids": [end]})
            first = next(groups)
            rollout.push(policy)
            assert paused_responses([first, *groups], taught, tmp_path, end) >= 16
        else:
            rollout.push(policy)
        after = greedy(rollout, prompts)
        assert after != before
        killer = kill_while_generating(rollout, 0, after=0.0)
        assert len(list(rollout.generate(prompts, n=8))) == 64
        killer.join()
        assert rollout.restarts == 1
        assert greedy(rollout, prompts) == after

    one = replace(config, model=str(tmp_path), rollout=RolloutRole())

    def spawn(index: int):
        kind = ray.remote(max_concurrency=1000)(RolloutEngine).options(num_gpus=1, runtime_env={"env_vars": ENVIRONMENT})
        return kind.remote(one, index=index, load_weights=True)

    fresh = RolloutEngines(spawn, num_engines=1, config=one)
    assert greedy(fresh, prompts) == after
    ray.kill(fresh.engines[0])
