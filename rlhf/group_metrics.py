"""What one generation batch says about the policy: rewards, lengths, failures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

from rlhf.advantages import has_signal
from rlhf.records import Group, Score


def group_metrics(scored: Sequence[tuple[Group, Score]]) -> dict[str, float | None]:
    """Means over the responses of a batch; a response that could not be scored is left out of every reward.

    `reward_std` is the mean over groups of the unbiased standard deviation within a group, `groups_without_signal` the share
    of groups whose rewards are all equal, `cut_off` the share of responses that reached the length limit,
    `reward/NAME` one function's mean, `unscored` the number of responses without a reward, `reward_failures/KIND` why.
    """
    rewards = [[r for r in score.rewards if r is not None] for _, score in scored]
    lengths = [length for group, _ in scored for length in group.response_lengths]
    reasons = [reason for group, _ in scored for reason in group.finish_reasons]
    metrics: dict[str, float | None] = {
        "reward": _mean(r for group in rewards for r in group),
        "reward_std": fmean(stdev(group) if len(group) > 1 else 0.0 for group in rewards),
        "groups_without_signal": fmean(not has_signal(score.rewards) for _, score in scored),
        "response_length": fmean(lengths),
        "response_tokens": sum(lengths),
        "cut_off": reasons.count("length") / len(reasons),
        "unscored": sum(r is None for _, score in scored for r in score.rewards),
    }
    for name in scored[0][1].by_function:
        metrics[f"reward/{name}"] = _mean(r for _, score in scored for r in score.by_function[name])
    for kind in sorted({kind for _, score in scored for kind in score.failures}):
        metrics[f"reward_failures/{kind}"] = sum(score.failures.get(kind, 0) for _, score in scored)
    return metrics


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
