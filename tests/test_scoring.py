"""Scoring with real reward processes: what a bad sample costs, and what ends a run."""

import os
import textwrap
import time
from types import SimpleNamespace

import numpy as np
import pytest
import ray

import rlhf.scoring
from actors.reward import RewardWorker
from rlhf.records import Group, GroupTokens, Prompt
from rlhf.scoring import Scorer, ScoringError

PLUGIN = """
    import os, time

    def length(completions, **columns):
        return [float(len(text)) for text in completions]

    def fragile(completions, **columns):
        for text in completions:
            if text == "raise": raise RuntimeError("no reward for this")
            if text == "hang": time.sleep(600)
            if text == "exit": os._exit(3)
            if text == "quit": raise SystemExit(1)
            if text == "eat":
                eaten = []
                while True: eaten.append(bytearray(1 << 26))
        return [float("nan") if text == "nan" else None if text == "none" else 10.0 for text in completions]

    def slow(completions, **columns):
        time.sleep(0.45 * len(completions))
        return [1.0] * len(completions)

    def tokens(completions, completion_ids, trainer_state):
        values = [sum(ids) + 100.0 * trainer_state.global_step + trainer_state.max_steps for ids in completion_ids]
        return [None if text == "none" else value for text, value in zip(completions, values)]

    def never(completions):
        return [None for text in completions]
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugin") / "my_rewards.py"
    path.write_text(textwrap.dedent(PLUGIN))
    return str(path)


def make_scorer(plugin, *reward_funcs, worker=RewardWorker, **changed):
    options = {
        "reward_funcs": list(reward_funcs),
        "reward_model": None,
        "reward_weights": None,
        "external_plugins": [plugin],
        "reward_workers": 2,
        "reward_timeout": 2.0,
        "reward_memory": 0.25,
        "call_timeout": 60,
    }
    config = SimpleNamespace(**{**options, **changed})
    actor = ray.remote(worker)
    return Scorer(lambda index: actor.options(num_cpus=0, max_restarts=0).remote(config), config, max_steps=7)


@pytest.fixture(scope="module")
def scorer(local_ray, plugin):
    scorer = make_scorer(plugin, "length", "fragile", reward_weights=[0.5, 1.0])
    scorer.wait_until_ready()
    yield scorer
    scorer.close()


def group(index, *texts):
    ids = tuple(np.full(3, item, np.int32) for item in range(len(texts)))
    tokens = GroupTokens(
        prompt_ids=np.zeros(4, np.int32), response_ids=ids, rollout_logprobs=tuple(np.zeros(3, np.float32) for _ in ids)
    )
    prompt = Prompt(
        index=index, token_ids=tokens.prompt_ids, messages=[{"role": "user", "content": "?"}], columns={"solution": "1"}
    )
    return Group(
        prompt=prompt,
        tokens=ray.put(tokens),
        texts=texts,
        finish_reasons=("stop",) * len(texts),
        response_lengths=(3,) * len(texts),
        weight_version=1,
    )


def test_rewards_are_weighted_sums_in_the_order_of_the_prompts(scorer):
    scored = scorer.score(iter([group(9, "ab", "abcd"), group(2, "none", "abc")]), step=1)
    assert [item.prompt.index for item, _ in scored] == [2, 9]
    assert [score.rewards for _, score in scored] == [(2.0, 11.5), (11.0, 12.0)]
    assert scored[0][1].by_function == {"length": (4.0, 3.0), "fragile": (None, 10.0)}
    assert scored[0][1].failures == {}
    assert scorer.score(iter([]), step=1) == []


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        ("raise", "raised"),
        ("quit", "raised"),
        ("hang", "timeout"),
        ("exit", "died"),
        ("eat", "died"),
        ("nan", "bad_value"),
    ],
)
def test_a_bad_sample_costs_its_own_reward_alone(scorer, bad, kind):
    restarts = scorer.restarts
    first, second = (score for _, score in scorer.score(iter([group(0, "a", bad, "b"), group(1, "c", "d", "e")]), step=2))
    assert first.rewards == (10.5, None, 10.5)
    assert first.by_function == {"length": (1.0, float(len(bad)), 1.0), "fragile": (10.0, None, 10.0)}
    assert first.failures == {kind: 1}
    assert second.rewards == (10.5, 10.5, 10.5) and second.failures == {}
    after = scorer.score(iter([group(0, "a")]), step=3)  # the replaced workers serve again
    assert after[0][1].rewards == (10.5,)
    assert (scorer.restarts > restarts) == (kind in ("timeout", "died"))


def test_a_worker_killed_from_outside_costs_nothing(scorer):
    restarts = scorer.restarts
    for worker in scorer.workers:
        ray.kill(worker.handle, no_restart=True)
    scored = scorer.score(iter([group(index, "a", "b") for index in range(6)]), step=4)
    assert [score.rewards for _, score in scored] == [(10.5, 10.5)] * 6
    assert all(score.failures == {} for _, score in scored)
    deadline = time.monotonic() + 30
    while scorer.restarts < restarts + 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert scorer.restarts == restarts + 2


def test_a_step_without_any_reward_ends_the_run(scorer):
    message = r"none of the 4 samples of step 5 .* 'fragile': raised: RuntimeError: no reward for this \(my_rewards.py:9\)"
    with pytest.raises(ScoringError, match=message):
        scorer.score(iter([group(0, "raise", "raise"), group(1, "raise", "raise")]), step=5)
    assert scorer.score(iter([group(0, "a")]), step=6)[0][1].rewards == (10.5,)


def test_a_broken_stream_leaves_the_scorer_usable(scorer):
    def broken():
        yield group(0, "a", "hang")
        raise ConnectionError("the engine is gone")

    with pytest.raises(ConnectionError):
        scorer.score(broken(), step=7)
    assert scorer.score(iter([group(0, "ab")]), step=7)[0][1].rewards == (11.0,)


def test_scoring_overlaps_generation_and_a_slow_function_is_called_singly(local_ray, plugin):
    scorer = make_scorer(plugin, "slow", reward_workers=1)
    texts = ("a", "b", "c", "d", "e", "f")  # 2.7 s together: too long; one at a time they pass

    def generate():
        yield group(0, *texts)
        deadline = time.monotonic() + 60
        while not scorer.singly and time.monotonic() < deadline:  # all of them are scored before the stream ends
            time.sleep(0.02)

    try:
        scorer.wait_until_ready()
        assert scorer.score(generate(), step=1)[0][1].rewards == (1.0,) * 6
        assert scorer.take_seconds()["score"] < 0.5
        assert scorer.restarts == 1
        assert scorer.score(iter([group(0, *texts)]), step=2)[0][1].rewards == (1.0,) * 6
        assert scorer.restarts == 1  # no call on the whole group this time
        assert scorer.take_seconds()["score"] >= 2.7 and scorer.take_seconds() == {}
    finally:
        scorer.close()


def test_functions_see_token_ids_and_the_step_and_may_apply_to_nothing(local_ray, plugin):
    scorer = make_scorer(plugin, "tokens", "never")
    try:
        score = scorer.score(iter([group(0, "a", "b")]), step=2)[0][1]
        assert score.rewards == (207.0, 210.0)
        assert score.by_function["never"] == (None, None)
        with pytest.raises(ScoringError, match="none of the 2 samples of step 3 has a reward: tokens, never returned None"):
            scorer.score(iter([group(0, "none", "none")]), step=3)
    finally:
        scorer.close()


def test_a_function_that_only_dies_ends_the_run_early(local_ray, plugin, monkeypatch):
    monkeypatch.setattr(rlhf.scoring, "LOST_IN_A_ROW", 3)
    scorer = make_scorer(plugin, "fragile", reward_workers=1)
    try:
        with pytest.raises(ScoringError, match="'fragile' failed 3 times in a row. The last: died: its process ended"):
            scorer.score(iter([group(index, "exit", "exit") for index in range(50)]), step=1)
    finally:
        scorer.close()


def worker_with_setup(action):
    class Worker(RewardWorker):  # in a function: travels to its process by value
        def setup(self):
            action()

    return Worker


@pytest.mark.parametrize(
    ("action", "timeout", "message"),
    [
        (lambda: os._exit(4), 60, "3 of 3 attempts.: died: its process ended"),
        (
            lambda: exec("raise OSError('the file system is away')"),
            60,
            "3 of 3 attempts.: raised: OSError: the file system is away",
        ),
        (lambda: time.sleep(600), 4, "1 of 3 attempts.: timeout: no answer within 4 s"),
    ],
)
def test_workers_that_cannot_start_end_the_run(local_ray, plugin, action, timeout, message):
    scorer = make_scorer(plugin, "length", worker=worker_with_setup(action), reward_workers=1, call_timeout=timeout)
    try:
        with pytest.raises(ScoringError, match=message):
            scorer.wait_until_ready()
        with pytest.raises(ScoringError, match=message):
            scorer.score(iter([group(0, "a")]), step=1)
    finally:
        scorer.close()
