"""Losses: tensors in, (loss, metrics) out. No model, no config, no communication.

Letters: T packed tokens, B sequences. A loss is this micro batch's share of the global loss: sum over t of
`weights * loss_mask * token loss`, where `weights` already holds the division by the global batch's counts
(`rlhf.batching.token_weights`), so the result does not depend on how the batch was split. Metrics add up over micro batches
and data-parallel ranks in the same way; a name that starts with "max_" takes the maximum.

The controller imports this module to name a loss, so it does without importing torch: tensors' own methods are enough.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf.records import MicroBatch

if TYPE_CHECKING:
    import torch

    Metrics = dict[str, torch.Tensor]


def sft_loss(logprobs: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, Metrics]:
    """Next-token cross entropy. logprobs [T], with gradient. The mask may hold fractional loss scales."""
    loss = -(batch.weights * batch.loss_mask * logprobs).sum()
    return loss, {}


def grpo_loss(
    logprobs: torch.Tensor,
    batch: MicroBatch,
    *,
    loss_type: str = "grpo",
    epsilon: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    beta: float = 0.0,
    importance_sampling_level: str = "token",
    rollout_importance_sampling_mode: str | None = None,
    rollout_importance_sampling_threshold: float = 2.0,
) -> tuple[torch.Tensor, Metrics]:
    """Clipped policy gradient with group advantages. logprobs [T], with gradient.

    loss_type: "cispo" clips the detached ratio at the absolute cap `epsilon_high` (MiniMax 2025, eq. 4); the others share the
    clipped surrogate (Shao et al. 2024, eq. 3) and differ in `weights` only. `delta` caps the unclipped branch (two-sided
    clipping, INTELLECT-2). importance_sampling_level: "token"; "sequence" (GSPO, Zheng et al. 2025, eq. 7);
    "sequence_token" (GSPO-token, eq. 14). beta: weight of the k3 estimate of KL(policy || reference).
    rollout_importance_sampling_*: corrects for the rollout engine's logprobs differing from the policy's.
    """
    counted = batch.loss_mask * (batch.weights != 0)
    old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
    log_ratio = importance_log_ratio(logprobs, old, batch.sequence_ids, counted, level=importance_sampling_level)
    ratio = log_ratio.exp()
    if loss_type == "cispo":
        clipped = ratio > epsilon_high
        token_loss = -ratio.clamp(max=epsilon_high).detach() * batch.advantages * logprobs
    else:
        bounded = ratio.clamp(1 - epsilon, 1 + epsilon_high)
        unbounded = ratio if delta is None else ratio.clamp(max=delta)
        token_loss = -(unbounded * batch.advantages).minimum(bounded * batch.advantages)
        clipped = (ratio < 1 - epsilon) & (batch.advantages < 0) | (ratio > 1 + epsilon_high) & (batch.advantages > 0)
    metrics: Metrics = {"clip_fraction": _mean(clipped.float(), counted, batch)}
    if batch.ref_logprobs is not None:
        kl = k3_kl(logprobs, batch.ref_logprobs)
        metrics["kl"] = _mean(kl.detach(), counted, batch)
        if beta:
            token_loss = token_loss + beta * kl
    if rollout_importance_sampling_mode:
        assert batch.rollout_logprobs is not None, "importance sampling against the rollout needs its logprobs"
        correction = rollout_weights(
            old - batch.rollout_logprobs,
            batch.sequence_ids,
            counted,
            mode=rollout_importance_sampling_mode,
            threshold=rollout_importance_sampling_threshold,
        )
        token_loss = token_loss * correction
        metrics["rollout_is_weight"] = _mean(correction, counted, batch)
    return (batch.weights * batch.loss_mask * token_loss).sum(), metrics


def importance_log_ratio(
    logprobs: torch.Tensor, old: torch.Tensor, sequence_ids: torch.Tensor, mask: torch.Tensor, *, level: str
) -> torch.Tensor:
    """Log of policy / old policy at each token, or its mean over the sequence. All [T]."""
    log_ratio = logprobs - old
    if level == "token":
        return log_ratio
    mean = sequence_mean(log_ratio, sequence_ids, mask)[sequence_ids]
    if level == "sequence":
        return mean
    if level == "sequence_token":
        return logprobs - logprobs.detach() + mean.detach()
    raise ValueError(f"importance_sampling_level {level!r}: choose token, sequence or sequence_token")


def k3_kl(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Unbiased, non-negative estimate of KL(policy || reference) at each token (Schulman 2020, "k3"), [T]; clamped to 10."""
    difference = (ref_logprobs - logprobs).clamp(-20, 20)
    return (difference.exp() - difference - 1).clamp(-10, 10)


def rollout_weights(
    log_ratio: torch.Tensor, sequence_ids: torch.Tensor, mask: torch.Tensor, *, mode: str, threshold: float
) -> torch.Tensor:
    """Importance weights of the policy against the rollout engine, [T], no gradient (Yao et al. 2025, truncated IS).

    mode: "token_truncate", min(w, threshold); "token_mask", w, or 0 where w > threshold; "sequence_truncate" and
    "sequence_mask": the same with w judged (truncate: and replaced) by its geometric mean over the sequence.
    """
    level, action = mode.split("_")
    log_ratio = log_ratio.detach().clamp(-20, 20)
    weights = judged = log_ratio.exp()
    if level == "sequence":
        judged = sequence_mean(log_ratio, sequence_ids, mask)[sequence_ids].exp()
    if action == "truncate":
        return judged.clamp(max=threshold)
    return weights.masked_fill(judged > threshold, 0.0)


def sequence_mean(values: torch.Tensor, sequence_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the masked tokens of each sequence: values, sequence_ids, mask [T] -> [B]."""
    size = int(sequence_ids.max()) + 1
    total = values.new_zeros(size).index_add(0, sequence_ids, values * mask)
    count = values.new_zeros(size).index_add(0, sequence_ids, mask.to(values.dtype))
    return total / count.clamp(min=1)


def _mean(values: torch.Tensor, mask: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """This micro batch's share of the global mean over trained tokens."""
    return (values * mask).sum() / max(batch.num_tokens, 1)
