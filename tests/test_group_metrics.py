import math

import numpy as np
import pytest

from rlhf.group_metrics import group_metrics
from rlhf.records import Group, Prompt, Score


def pair(rewards, lengths, reasons, failures=None):
    prompt = Prompt(index=0, token_ids=np.zeros(3, np.int32), messages=[], columns={})
    group = Group(
        prompt=prompt, tokens=None, texts=("",) * len(rewards), finish_reasons=reasons, response_lengths=lengths, weight_version=1
    )
    return group, Score(rewards=rewards, by_function={"f": rewards}, failures=failures or {})


def test_unscored_responses_are_left_out_of_rewards_and_counted():
    scored = [
        pair((1.0, 0.0, None), (4, 2, 6), ("stop", "stop", "length"), {"timeout": 1}),
        pair((1.0, 1.0, 1.0), (1, 1, 4), ("stop", "length", "stop")),
    ]
    metrics = group_metrics(scored)
    assert metrics["reward"] == metrics["reward/f"] == pytest.approx(4 / 5)
    assert metrics["reward_std"] == pytest.approx(math.sqrt(0.5) / 2)
    assert metrics["groups_without_signal"] == 0.5
    assert metrics["response_length"] == 3.0
    assert metrics["response_tokens"] == 18
    assert metrics["cut_off"] == pytest.approx(2 / 6)
    assert metrics["unscored"] == metrics["reward_failures/timeout"] == 1
