import math

import pytest

from rlhf.advantages import group_advantages, has_signal


def test_group_scaled_advantages_of_two_responses():
    # unbiased deviation of {1, 0} is sqrt(1/2); (1 - 0.5) / (0.70711 + 1e-4)
    advantages = group_advantages([[1.0, 0.0], [1.0, 1.0]])
    expected = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert advantages[0] == pytest.approx([expected, -expected])
    assert advantages[1] == [0.0, 0.0]


def test_a_missing_reward_takes_no_part():
    whole = group_advantages([[3.0, 1.0, 2.0]])[0]
    assert group_advantages([[3.0, None, 1.0, 2.0]])[0] == [whole[0], None, whole[1], whole[2]]
    assert group_advantages([[None, None]]) == [[None, None]]


def test_rloo_subtracts_the_mean_of_the_others():
    rewards = [4.0, 1.0, 1.0, 2.0]
    expected = [r - (sum(rewards) - r) / 3 for r in rewards]
    assert group_advantages([rewards], estimator="rloo", scale="none")[0] == pytest.approx(expected)


def test_reinforce_plus_plus_scales_by_the_deviation_of_all_advantages():
    # advantages 1 -1 2 -2: unbiased variance 10 / 3
    scale = math.sqrt(10 / 3) + 1e-4
    result = group_advantages([[2.0, 0.0], [9.0, 5.0]], estimator="reinforce_plus_plus", scale="batch")
    assert result == [pytest.approx([1 / scale, -1 / scale]), pytest.approx([2 / scale, -2 / scale])]


def test_kl_is_taken_from_the_reward_before_the_baseline():
    plain = group_advantages([[1.0 - 0.1 * 2.0, 0.0 - 0.1 * 4.0]])
    assert group_advantages([[1.0, 0.0]], kl=[[2.0, 4.0]], beta=0.1)[0] == pytest.approx(plain[0])


def test_signal_needs_two_different_rewards():
    assert has_signal([0.0, 1.0, None])
    assert not has_signal([1.0, 1.0])
    assert not has_signal([1.0, None])
