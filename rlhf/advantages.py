"""Group-relative advantages. Pure functions of numbers.

A reward of None (a sample that could not be scored) takes no part in any statistic, and its advantage is None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

EPSILON = 1e-4  # added to a standard deviation before dividing by it

Rewards = Sequence[Sequence[float | None]]  # [groups][responses]


def group_advantages(
    rewards: Rewards, *, estimator: str = "grpo", scale: str = "group", kl: Rewards | None = None, beta: float = 0.0
) -> list[list[float | None]]:
    """Advantage of every response against the other responses to its prompt, [groups][responses].

    estimator: "grpo", R - mean (Shao et al. 2024, eq. 3); "rloo", R minus the mean of the other responses (Ahmadian et al.
    2024); "reinforce_plus_plus", R - mean, scaled by the deviation of the advantages (Hu et al. 2025).
    scale: divide by the unbiased standard deviation of the "group" or of the whole "batch", or "none".
    kl: [groups][responses] KL of the policy from the reference, summed over a response's tokens; `beta` times it is taken
    from the reward first (`kl_in_reward`).
    """
    if kl is not None:
        rewards = [[None if r is None else r - beta * k for r, k in zip(group, kls)] for group, kls in zip(rewards, kl)]
    advantages = [_centred(group, leave_one_out=estimator == "rloo") for group in rewards]
    spread_of = advantages if estimator == "reinforce_plus_plus" else rewards
    if scale == "none":
        return advantages
    if scale == "batch":
        spread = _deviation([value for group in spread_of for value in group])
        spreads = [spread] * len(advantages)
    elif scale == "group":
        spreads = [_deviation(group) for group in spread_of]
    else:
        raise ValueError(f"scale_rewards {scale!r}: choose group, batch or none")
    return [[None if a is None else a / (s + EPSILON) for a in group] for group, s in zip(advantages, spreads)]


def has_signal(rewards: Sequence[float | None]) -> bool:
    """Whether a group's rewards differ, so that it has a gradient (`dynamic_sample` keeps such groups)."""
    scored = [r for r in rewards if r is not None]
    return len(scored) > 1 and not math.isclose(min(scored), max(scored), rel_tol=0, abs_tol=1e-9)


def _centred(rewards: Sequence[float | None], *, leave_one_out: bool) -> list[float | None]:
    scored = [r for r in rewards if r is not None]
    if not scored:
        return [None] * len(rewards)
    mean, k = fmean(scored), len(scored)
    factor = k / (k - 1) if leave_one_out and k > 1 else 1.0
    return [None if r is None else factor * (r - mean) for r in rewards]


def _deviation(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return stdev(known) if len(known) > 1 else 0.0
