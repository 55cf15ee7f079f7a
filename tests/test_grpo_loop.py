"""The order of the loop, with stand-ins that only write down what is asked of them."""

from types import SimpleNamespace

import numpy as np
import pytest

from rlhf.config import Config
from rlhf.grpo import sample, train_grpo
from rlhf.records import Group, Prompt, Score


def config(**options) -> Config:
    settled = dict(
        num_generations=2, global_batch_size=4, generation_batch_size=4, steps_per_generation=1, loss_type="grpo", beta=0.0,
        epsilon_high=0.2, scale_rewards="group", kl_in_reward=False, micro_batch_size=4,
    )  # fmt: skip
    return Config(task="grpo", **(settled | options))


class StandIn:
    """Every role in one; `calls` is what was asked, in order."""

    data_size, version, epoch = 1, 0, 0.0

    def __init__(self, rewards=(1.0, 0.0)):
        self.calls, self.rewards, self.prompts = [], rewards, 0

    def next_batch(self, count):
        self.calls.append("prompts")
        self.prompts += count
        return list(range(self.prompts - count, self.prompts))

    def generate(self, prompts, n):
        self.calls.append("generate")
        for index in prompts:
            prompt = Prompt(index=index, token_ids=np.zeros(2, np.int32), messages=[], columns={})
            yield Group(
                prompt=prompt, tokens=None, texts=("",) * n, finish_reasons=("stop",) * n, response_lengths=(1,) * n,
                weight_version=self.version,
            )  # fmt: skip

    def score(self, groups, step):
        pairs = [(group, Score(rewards=self.rewards, by_function={})) for group in groups]
        self.calls.append("score")
        return pairs

    def push(self, policy):
        self.calls.append("push")
        self.version += 1

    def metrics(self):
        return {}

    def on_shards(self, method, shards, *_):
        self.calls.append(f"{method} {sum(len(b) for b in shards[0].micro_batches)}")
        return [{"loss": 0.0, "lr": 1.0}]

    def on_shards_refs(self, method, shards, *_):
        self.calls.append(method)
        return ["logprobs"]

    def step(self, step, *_):
        self.calls.append(f"log {step}")

    def save_if_due(self, step, *_):
        self.calls.append(f"save {step}")

    def state(self):
        return {}

    def roles(self, **changed):
        names = ("policy", "data", "rollout", "scorer", "reference")
        return SimpleNamespace(**({name: self for name in names} | changed))


def run(total, **options) -> list[str]:
    it = StandIn()
    reference = it if options.get("beta") else None
    train_grpo(config(**options), it.roles(reference=reference), log=it, checkpoints=it, start=0, total=total)
    return it.calls


def test_one_step_is_push_sample_score_update_log_save():
    assert run(1) == ["push", "prompts", "generate", "score", "train_step 4", "log 1", "save 1"]


def test_a_reference_scores_before_the_update():
    assert run(1, beta=0.1)[1:6] == ["prompts", "generate", "score", "logprobs", "train_step 4"]


def test_several_updates_share_a_generation_and_need_old_logprobs():
    calls = run(4, global_batch_size=2, steps_per_generation=2, num_iterations=2)
    assert calls[4:] == ["logprobs", *["train_step 2"] * 4, "log 4", "save 4"]


def test_kl_in_reward_without_a_reference_asks_for_no_logprobs():
    assert "logprobs" not in run(1, kl_in_reward=True)


@pytest.mark.parametrize(("rewards", "rounds"), [((1.0, 0.0), 1), ((1.0, 1.0), 4)])
def test_dynamic_sample_draws_again_until_groups_differ_or_rounds_are_spent(rewards, rounds):
    it = StandIn(rewards)
    scored = sample(config(dynamic_sample=True), it.roles(), step=0)
    assert it.calls.count("generate") == rounds
    assert len(scored) == 2
