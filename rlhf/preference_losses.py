"""Losses of preference learning (DPO and its kin, KTO, reward models): tensors in, one value for each pair or sequence out.

Letters: P pairs, B sequences, T packed tokens. The loss of a step is the mean of these values over its global batch,
so a batch may be split at will, except where a docstring says that a value depends on the whole batch. Logprobs are
natural logarithms summed over the tokens of a response. No model, no config, no communication; the controller imports
this module to name a loss, so torch is imported inside the functions that need it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch

DPO_LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft",
)  # fmt: skip
WHOLE_BATCH_LOSS_TYPES = ("aot", "aot_unpaired")  # they sort over all pairs of the global batch
SMOOTHED_LOSS_TYPES = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")  # of label_smoothing
PLAIN_RATIO_LOSS_TYPES = ("aot", "aot_unpaired", "apo_zero", "sft")  # whatever the f-divergence, as in TRL
FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
F_DIVERGENCE_TYPES: tuple[FDivergence, ...] = get_args(FDivergence)
KTO_LOSS_TYPES = ("kto", "apo_zero_unpaired")

EXO_LABEL_SMOOTHING = 1e-3  # the value that the EXO paper recommends; 0 would make the loss infinite
LARGEST_EXPONENT = 80.0  # exp(80) is still a float32


def dpo_losses(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    loss_type: str,
    beta: float,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    reference_free: bool = False,
    delta: float = 0.0,
    discopop_tau: float = 0.05,
    mean_chosen_length: float | None = None,
) -> torch.Tensor:
    """Loss of each pair, [P]; the loss of the step is its mean over the global batch.

    chosen, rejected, ref_chosen, ref_rejected [P]: summed logprobs of the policy and of the reference. chosen_lengths,
    rejected_lengths [P]: response tokens. Below, c and r are the f-divergence scores of the two responses (by default
    log policy - log reference) and m = beta (c - r). `reference_free` takes 0 for every reference logprob.

    sigmoid: -log sigmoid(m) (Rafailov et al. 2023, eq. 7), or with label_smoothing e the conservative DPO,
        -(1 - e) log sigmoid(m) - e log sigmoid(-m) (Mitchell 2023).
    robust: the unbiased version for labels flipped with probability e < 0.5 (Chowdhury et al. 2024).
    hinge: max(0, 1 - m) (SLiC, Zhao et al. 2023).
    ipo: (c / length - r / length - 1 / (2 beta))^2, normalised by the responses' lengths, that is, of average logprobs
        (Azar et al. 2023, eq. 17; its authors confirmed the normalisation to TRL).
    exo_pair: KL(softmax(beta c, beta r) || (1 - e, e)) (Ji et al. 2024, eq. 16); label_smoothing 0 stands for 1e-3.
    nca_pair: -log sigmoid(beta c) - log sigmoid(-beta c) / 2 - log sigmoid(-beta r) / 2 (Chen et al. 2024).
    bco_pair: -log sigmoid(beta c - delta) - log sigmoid(delta - beta r) (Jung et al. 2024). `delta` is the running
        mean of rewards: before the loss of each step, the caller updates a `RunningMean` with the mean of `dpo_rewards`
        over all chosen and rejected responses of the global batch and passes its mean. delta 0 is TRL's bco_pair.
    sppo_hard: (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2 (Wu et al. 2024, eq. 4.7).
    aot, aot_unpaired: log ratios sorted over the batch (Melnyk et al. 2024), smoothed as in "sigmoid". DEPENDS ON THE
        WHOLE BATCH: give all pairs of the global batch. Values are in sorted order, not in that of the pairs.
    apo_zero, apo_down: D'Oosterlinck et al. 2024, eq. 7 and 8.
    discopop: logistic and exponential loss mixed by sigmoid(m / discopop_tau) (Lu et al. 2024, eq. 5).
    sft: the chosen response's negative logprob, see `chosen_nll`; needs mean_chosen_length, and `chosen` unweighted
        (without `ld_alpha`).

    PLAIN_RATIO_LOSS_TYPES use plain log ratios whatever the f-divergence. Raises ValueError for an unknown loss_type or
    f_divergence_type and for robust with label_smoothing outside [0, 0.5).
    """
    from torch.nn.functional import logsigmoid

    if reference_free:
        ref_chosen, ref_rejected = chosen.new_zeros(()), rejected.new_zeros(())
    chosen_ratio, rejected_ratio = chosen - ref_chosen, rejected - ref_rejected
    c = _f_divergence_score(chosen_ratio, f_divergence_type, f_alpha_divergence_coef)
    r = _f_divergence_score(rejected_ratio, f_divergence_type, f_alpha_divergence_coef)
    margin = beta * (c - r)
    match loss_type:
        case "sigmoid":
            return _smoothed_logistic(margin, label_smoothing)
        case "robust":
            if not 0 <= label_smoothing < 0.5:
                raise ValueError(f"loss_type robust: label_smoothing is {label_smoothing}; choose one in [0, 0.5)")
            kept = (1 - label_smoothing) * logsigmoid(margin)
            return -(kept - label_smoothing * logsigmoid(-margin)) / (1 - 2 * label_smoothing)
        case "hinge":
            return (1 - margin).relu()
        case "ipo":
            average = c / chosen_lengths.clamp(min=1) - r / rejected_lengths.clamp(min=1)
            return (average - 1 / (2 * beta)) ** 2
        case "exo_pair":
            smoothing = chosen.new_tensor(label_smoothing or EXO_LABEL_SMOOTHING)
            right = margin.sigmoid() * (logsigmoid(margin) - (-smoothing).log1p())
            return right + (-margin).sigmoid() * (logsigmoid(-margin) - smoothing.log())
        case "nca_pair":
            return -logsigmoid(beta * c) - 0.5 * logsigmoid(-beta * c) - 0.5 * logsigmoid(-beta * r)
        case "bco_pair":
            return -logsigmoid(beta * c - delta) - logsigmoid(delta - beta * r)
        case "sppo_hard":
            return (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2
        case "aot":
            ours, theirs = chosen - rejected, (ref_chosen - ref_rejected).expand_as(chosen)
            return _smoothed_logistic(beta * (ours.sort().values - theirs.sort().values), label_smoothing)
        case "aot_unpaired":
            difference = chosen_ratio.sort().values - rejected_ratio.sort().values
            return _smoothed_logistic(beta * difference, label_smoothing)
        case "apo_zero":
            return 1 - (beta * chosen_ratio).sigmoid() + (beta * rejected_ratio).sigmoid()
        case "apo_down":
            return (beta * chosen_ratio).sigmoid() + 1 - margin.sigmoid()
        case "discopop":
            mixing = (margin / discopop_tau).sigmoid()
            return -logsigmoid(margin) * (1 - mixing) + (-margin).exp() * mixing
        case "sft":
            assert mean_chosen_length is not None, "loss_type sft needs the global batch's mean_chosen_length"
            return chosen_nll(chosen, mean_chosen_length=mean_chosen_length)
    raise ValueError(f"loss_type {loss_type!r}: choose {', '.join(DPO_LOSS_TYPES)}")


def chosen_nll(chosen: torch.Tensor, *, mean_chosen_length: float) -> torch.Tensor:
    """Negative logprob of the chosen responses, [P], whose mean over the global batch is the mean over its chosen tokens.

    That token mean is the normalisation of TRL's and ms-swift's `sft` and of ms-swift's RPO term (Pang et al. 2024,
    eq. 1, normalises each response by its own length instead): a DPO loss with `rpo_alpha` is
    `dpo_losses(...) + rpo_alpha * chosen_nll(...)`. chosen [P]: logprobs summed over the response, not weighted by
    `ld_alpha`. mean_chosen_length: chosen response tokens of the global batch / its pairs.
    """
    return -chosen / mean_chosen_length


def dpo_rewards(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Implicit rewards beta (log policy - log reference) of chosen and rejected responses (Rafailov et al. 2023, eq. 5).

    Summed logprobs [P] -> [P], [P], without gradient, whatever the f-divergence and `reference_free`.
    """
    return beta * (chosen - ref_chosen).detach(), beta * (rejected - ref_rejected).detach()


def reward_metrics(chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> dict[str, torch.Tensor]:
    """What TRL logs of a pair's rewards, by name; each [P], to be averaged over the global batch."""
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).to(chosen_rewards.dtype),
        "rewards/margins": chosen_rewards - rejected_rewards,
    }


@dataclass(frozen=True, kw_only=True)
class RunningMean:
    """Mean of all values seen, the `delta` of bco_pair; one value for each step (the mean reward of its global batch)."""

    mean: float = 0.0
    count: int = 0

    def updated(self, value: float) -> RunningMean:
        """With one more value."""
        count = self.count + 1
        return RunningMean(mean=self.mean + (value - self.mean) / count, count=count)


def ld_dpo_weights(
    mask: torch.Tensor, sequence_ids: torch.Tensor, shared_lengths: torch.Tensor, *, ld_alpha: float
) -> torch.Tensor:
    """Weights of LD-DPO (Liu et al. 2024): 1 for the response tokens of the shared length, ld_alpha beyond, [T].

    With `ld_alpha`, `dpo_losses` takes the logprobs of policy AND reference summed with them, as in TRL; ms-swift leaves the
    reference unweighted.

    mask [T]: 1 at response tokens; the weight is 0 elsewhere. sequence_ids [T]: ascending, in 0..B-1. shared_lengths [B]:
    response tokens of the shorter response of the sequence's pair. Call before tokens are split over context ranks.
    """
    counted = mask.bool().long()
    counts = counted.new_zeros(len(shared_lengths)).index_add(0, sequence_ids, counted)
    before = counts.cumsum(0) - counts  # response tokens of earlier sequences
    position = counted.cumsum(0) - before[sequence_ids]  # from 1 at the first response token
    weights = mask.new_ones(mask.shape).masked_fill(position > shared_lengths[sequence_ids], ld_alpha)
    return weights * counted


def kto_losses(
    log_ratios: torch.Tensor,
    desirable: torch.Tensor,
    kl: torch.Tensor | float,
    *,
    loss_type: str,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """Loss of each sequence, [B]; the loss of the step is its mean over the global batch.

    log_ratios [B]: log policy - log reference, summed over the response. desirable [B] bool. kl: of the global batch,
    max(0, mean log ratio of prompts with another one's response). "kto": w (1 - sigmoid(+-beta (log ratio - kl))), + where
    desirable (Ethayarajh et al. 2024, section 4). "apo_zero_unpaired": the same without kl (D'Oosterlinck et al. 2024, eq. 7,
    unpaired). Raises ValueError for others.
    """
    if loss_type not in KTO_LOSS_TYPES:
        raise ValueError(f"loss_type {loss_type!r}: choose {' or '.join(KTO_LOSS_TYPES)}")
    reward = beta * (log_ratios - (kl if loss_type == "kto" else 0.0))
    wanted = desirable.to(reward.dtype)
    weight = desirable_weight * wanted + undesirable_weight * (1 - wanted)
    return weight * (1 - ((2 * wanted - 1) * reward).sigmoid())


def reward_pair_losses(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    margins: torch.Tensor | None = None,
    *,
    center_rewards_coefficient: float | None = None,
) -> torch.Tensor:
    """Bradley-Terry loss of a reward model, [P]; the loss of the step is its mean over the global batch.

    chosen, rejected [P]: scores. -log sigmoid(chosen - rejected - margin) (Touvron et al. 2023, eq. 2), plus
    coefficient (chosen + rejected)^2, which keeps scores around 0 (Eisenstein et al. 2023, eq. 2).
    """
    from torch.nn.functional import logsigmoid

    difference = chosen - rejected
    losses = -logsigmoid(difference if margins is None else difference - margins)
    if center_rewards_coefficient is not None:
        losses = losses + center_rewards_coefficient * (chosen + rejected) ** 2
    return losses


def _smoothed_logistic(margin: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """-log sigmoid of the margin, for labels of which `label_smoothing` are taken to be flipped."""
    from torch.nn.functional import logsigmoid

    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def _f_divergence_score(log_ratio: torch.Tensor, name: str, alpha: float) -> torch.Tensor:
    """f'(policy / reference) up to a constant, in the place of the log ratio (f-DPO, Wang et al. 2023), [P].

    alpha is TRL's, f'(u) = (u^(alpha - 1) - 1) / (alpha - 1): 1 is the reverse KL, 0 the forward KL. ms-swift's own
    coefficient is 1 - alpha; the two agree at their default, 0.5.
    """
    from torch.nn.functional import logsigmoid

    match name:
        case "reverse_kl":
            return log_ratio
        case "forward_kl":
            return -(-log_ratio).exp()
        case "js_divergence":
            return logsigmoid(log_ratio)
        case "alpha_divergence":
            if abs(alpha - 1) < 1e-6:
                return log_ratio
            return ((alpha - 1) * log_ratio).clamp(max=LARGEST_EXPONENT).exp() / (alpha - 1)
    raise ValueError(f"f_divergence_type {name!r}: choose {', '.join(F_DIVERGENCE_TYPES)}")
