"""Losses: tensors in, (loss, metrics) out. No model, no config, no communication.

Letters: T packed tokens, B sequences. A loss is this micro batch's share of the global loss: sum over t of
`weights * loss_mask * token loss`, where `weights` already holds the division by the global batch's counts
(`rlhf.batching.token_weights`), so the result does not depend on how the batch was split. Metrics add up over micro batches
and data-parallel ranks in the same way; a name that starts with "max_" takes the maximum.

The controller imports this module to name a loss, so it does without importing torch: tensors' own methods are enough.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf.preference_losses import (
    WHOLE_BATCH_LOSS_TYPES,
    chosen_nll,
    dpo_losses,
    dpo_rewards,
    kto_losses,
    ld_dpo_weights,
    reward_metrics,
)
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


def dpo_loss(
    logprobs: torch.Tensor,
    batch: MicroBatch,
    *,
    loss_type: str,
    beta: float,
    mean_chosen_length: float,
    ld_alpha: float | None = None,
    rpo_alpha: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, Metrics]:
    """Mean over the pairs of the global batch of `preference_losses.dpo_losses`, whose `options` are passed on.

    logprobs [T], with gradient. Sequences stand in pairs, the chosen one first. `mean_chosen_length`: of the global batch.
    A loss that depends on all pairs takes those of other micro batches, as constants, from `batch.batch_values`.
    """
    sums, ref_sums = logprob_sums(logprobs, batch, ld_alpha=ld_alpha).unbind(1)
    counted, lengths = batch.sequence_weights, sequence_sums(batch.loss_mask != 0, batch)
    whole = loss_type in WHOLE_BATCH_LOSS_TYPES
    pairs = [pairs_of(values) for values in (sums, ref_sums.detach(), lengths)]
    if whole:
        assert batch.batch_values is not None, f"loss_type {loss_type} needs the logprobs of the whole batch"
        own = counted != 0
        all_sums = batch.batch_values[:, 0].index_put((batch.keys[own],), sums[own])
        pairs_of_loss = [pairs_of(all_sums), pairs_of(batch.batch_values[:, 1]), pairs_of(batch.batch_values[:, 0] * 0 + 1)]
    else:
        pairs_of_loss = pairs
    (chosen, rejected), (ref_chosen, ref_rejected), (chosen_lengths, rejected_lengths) = pairs_of_loss
    losses = dpo_losses(
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
        loss_type=loss_type,
        beta=beta,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        mean_chosen_length=mean_chosen_length,
        **options,
    )
    weights, _ = pairs_of(counted)
    loss = share_of(losses.mean(), weights.sum()) if whole else (weights * losses).sum()
    if rpo_alpha:
        plain = pairs_of(sequence_sums(logprobs * (batch.loss_mask != 0), batch))[0]
        loss = loss + rpo_alpha * (weights * chosen_nll(plain, mean_chosen_length=mean_chosen_length)).sum()
    (chosen, rejected), (ref_chosen, ref_rejected), _ = pairs
    rewards = reward_metrics(*dpo_rewards(chosen, rejected, ref_chosen, ref_rejected, beta=beta))
    return loss, {name: (weights * values).sum() for name, values in rewards.items()}


def kto_loss(
    logprobs: torch.Tensor,
    batch: MicroBatch,
    *,
    counts: tuple[int, int],
    loss_type: str,
    kl: float,
    beta: float,
    **options: Any,
) -> tuple[torch.Tensor, Metrics]:
    """Mean over the rows of the global batch of `preference_losses.kto_losses`, whose `options` are passed on.

    logprobs [T], with gradient. `counts`: desirable and undesirable rows of the global batch, over which rewards are averaged.
    Metrics: rewards/accuracies is the share of rows on the right side of the KL.
    """
    sums, ref_sums = logprob_sums(logprobs, batch).unbind(1)
    ratios, desirable = sums - ref_sums, batch.targets[:, 0] > 0
    losses = kto_losses(ratios, desirable, kl, loss_type=loss_type, beta=beta, **options)
    counted, rewards = batch.sequence_weights != 0, beta * ratios.detach()
    metrics = {
        f"rewards/{name}": (rewards * (counted & chosen)).sum() / max(count, 1)
        for name, chosen, count in zip(("chosen", "rejected"), (desirable, ~desirable), counts)
    }
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    metrics["rewards/accuracies"] = (batch.sequence_weights * ((rewards > beta * kl) == desirable)).sum()
    return (batch.sequence_weights * losses).sum(), metrics


def gkd_loss(logprobs: torch.Tensor | None, batch: MicroBatch, *, sft_alpha: float = 0.0) -> tuple[torch.Tensor, Metrics]:
    """Mean over the trained tokens of the global batch of their divergence from the teacher, which `batch.divergences` holds.

    With `sft_alpha`, plus so many times their cross entropy, from logprobs [T] with gradient. Generalized knowledge distillation
    (Agarwal et al. 2024). A token counts once whatever its loss scale. The metric `kl` is KL(teacher || policy), whatever beta.
    """
    trained = batch.weights * (batch.loss_mask != 0)
    loss = (trained * batch.divergences).sum()
    metrics = {"kl": (trained * batch.teacher_kl).sum()}
    if sft_alpha:
        assert logprobs is not None, "sft_alpha needs logprobs"
        cross_entropy = -(trained * logprobs).sum()
        metrics |= {"jsd_loss": loss.detach(), "sft_loss": cross_entropy.detach()}
        loss = loss + sft_alpha * cross_entropy
    return loss, metrics


def logprob_sums(logprobs: torch.Tensor, batch: MicroBatch, *, ld_alpha: float | None = None) -> torch.Tensor:
    """Logprobs of each sequence's trained tokens under the policy and the reference (0 without one): [T] -> [B, 2] float64.

    Tokens count once whatever their loss scale, those beyond the shorter response of a pair with `ld_alpha`.
    """
    import torch

    mask = (batch.loss_mask != 0).to(logprobs.dtype)
    if ld_alpha is not None:
        lengths = sequence_sums(mask, batch)
        chosen, rejected = pairs_of(lengths)
        shared = chosen.minimum(rejected).repeat_interleave(2)
        shared = torch.cat([shared, lengths[len(shared) :]])
        mask = ld_dpo_weights(mask, batch.sequence_ids, shared, ld_alpha=ld_alpha)
    sums = sequence_sums(logprobs * mask, batch)
    ref = batch.ref_logprobs
    return torch.stack([sums, torch.zeros_like(sums) if ref is None else sequence_sums(ref * mask, batch)], dim=1)


def sequence_sums(values: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """[T] -> [B] float64: sums of policy and reference are close to each other, and a loss is of their difference."""
    values = values.double()
    return values.new_zeros(len(batch.sequence_weights)).index_add(0, batch.sequence_ids, values)


def pairs_of(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B] -> chosen [P], rejected [P]: a last sequence without a partner is padding."""
    return values[: len(values) // 2 * 2].view(-1, 2).unbind(1)


def share_of(loss: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """This micro batch's share of a loss of the whole batch, with the gradient of all of it."""
    return loss - loss.detach() * (1 - share)


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
