"""The losses against the papers' formulas written out sequence by sequence in plain Python."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from rlhf.batching import token_weights
from rlhf.losses import dpo_loss, grpo_loss, rollout_weights, sft_loss
from rlhf.records import MicroBatch

ADVANTAGES = [0.9, -1.2, 0.4]
LENGTHS = [3, 5, 2]  # response tokens
PROMPT = 2


def numbers(seed: int, spread: float = 0.4) -> list[list[float]]:
    g = torch.Generator().manual_seed(seed)
    return [(-1.5 + spread * torch.randn(n, generator=g)).tolist() for n in LENGTHS]


NEW, OLD, REF, ROLLOUT = numbers(0), numbers(1), numbers(2), numbers(3)


def micro_batch(chosen: list[int], weights: list[float], **logprobs: list[list[float]]) -> MicroBatch:
    """The chosen sequences packed, each with PROMPT masked positions in front."""

    def packed(values):
        return torch.tensor([x for i in chosen for x in [0.0] * PROMPT + values(i)])

    total = sum(PROMPT + LENGTHS[i] for i in chosen)
    return MicroBatch(
        token_ids=torch.zeros(total, dtype=torch.long),
        position_ids=torch.zeros(total, dtype=torch.long),
        cu_seqlens=torch.zeros(1, dtype=torch.int32),
        labels=torch.zeros(total, dtype=torch.long),
        loss_mask=packed(lambda i: [1.0] * LENGTHS[i]),
        weights=packed(lambda i: [weights[i]] * LENGTHS[i]),
        advantages=packed(lambda i: [ADVANTAGES[i]] * LENGTHS[i]),
        sequence_ids=torch.tensor([b for b, i in enumerate(chosen) for _ in range(PROMPT + LENGTHS[i])]),
        sequence_weights=torch.tensor([weights[i] for i in chosen]),
        keys=torch.tensor(chosen),
        targets=torch.zeros(len(chosen), 0),
        num_tokens=sum(LENGTHS),
        num_sequences=len(LENGTHS),
        **{name: packed(lambda i, v=v: v[i]) for name, v in logprobs.items()},
    )


def run(chosen: list[int], loss_type: str, **options) -> tuple[float, list[list[float]], dict]:
    """Loss, gradient by sequence, metrics of our loss over the chosen sequences."""
    weights = token_weights(loss_type, LENGTHS, [True] * 3, max_completion_length=8)
    batch = micro_batch(chosen, weights, old_logprobs=OLD, ref_logprobs=REF, rollout_logprobs=ROLLOUT)
    logprobs = torch.tensor([x for i in chosen for x in [0.0] * PROMPT + NEW[i]], requires_grad=True)
    loss, metrics = grpo_loss(logprobs, batch, loss_type=loss_type, **options)
    loss.backward()
    parts = torch.split(logprobs.grad, [PROMPT + LENGTHS[i] for i in chosen])
    return loss.item(), [p[PROMPT:].tolist() for p in parts], {k: v.item() for k, v in metrics.items()}


def by_hand(loss_type, level="token", low=0.2, high=0.3, delta=None, beta=0.0) -> torch.Tensor:
    """The objective of section 4.1 of the GRPO paper and its variants, one token at a time, with gradients through NEW."""
    total_tokens = sum(LENGTHS)
    loss = 0.0
    leaves = [torch.tensor(x, requires_grad=True) for x in NEW]
    for new, old, ref, advantage, n in zip(leaves, OLD, REF, ADVANTAGES, LENGTHS):
        mean_log_ratio = sum(new[t] - old[t] for t in range(n)) / n
        sequence = 0.0
        for t in range(n):
            ratio = {
                "token": lambda: torch.exp(new[t] - old[t]),
                "sequence": lambda: torch.exp(mean_log_ratio),
                "sequence_token": lambda: torch.exp(mean_log_ratio.detach()) * new[t].exp() / new[t].exp().detach(),
            }[level]()
            if loss_type == "cispo":
                term = -min(ratio.item(), high) * advantage * new[t]
            else:
                free = ratio if delta is None else torch.minimum(ratio, torch.tensor(delta))
                held = torch.clamp(ratio, 1 - low, 1 + high)
                term = -torch.minimum(free * advantage, held * advantage)
            difference = ref[t] - new[t]
            sequence = sequence + term + beta * (torch.exp(difference) - difference - 1)
        loss = loss + sequence * {
            "grpo": 1 / n / 3, "bnpo": 1 / total_tokens, "dapo": 1 / total_tokens, "cispo": 1 / total_tokens,
            "dr_grpo": 1 / (3 * 8),
        }[loss_type]  # fmt: skip
    loss.backward()
    return loss.item(), [leaf.grad.tolist() for leaf in leaves]


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo", "cispo"])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
@pytest.mark.parametrize("delta", [None, 1.4])
def test_loss_and_gradient_equal_the_formula(loss_type, level, delta):
    options = dict(epsilon=0.2, epsilon_high=0.3, delta=delta, beta=0.04, importance_sampling_level=level)
    loss, gradient, _ = run([0, 1, 2], loss_type, **options)
    expected, expected_gradient = by_hand(loss_type, level, delta=delta, beta=0.04)
    assert loss == pytest.approx(expected, abs=1e-6)
    for ours, theirs in zip(gradient, expected_gradient):
        assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "cispo"])
def test_loss_gradient_and_metrics_are_unchanged_by_splitting_the_batch(loss_type):
    options = dict(epsilon_high=0.3, beta=0.04, importance_sampling_level="sequence")
    whole = run([0, 1, 2], loss_type, **options)
    parts = [run([1], loss_type, **options), run([2, 0], loss_type, **options)]
    assert sum(p[0] for p in parts) == pytest.approx(whole[0], abs=1e-7)
    for name, value in whole[2].items():
        assert sum(p[2][name] for p in parts) == pytest.approx(value, abs=1e-6)
    split_gradient = [parts[1][1][1], parts[0][1][0], parts[1][1][0]]
    for ours, theirs in zip(split_gradient, whole[1]):
        assert ours == pytest.approx(theirs, abs=1e-7)


def test_without_old_logprobs_the_gradient_is_the_plain_policy_gradient():
    weights = token_weights("dapo", LENGTHS, [True] * 3, max_completion_length=8)
    batch = micro_batch([0, 1, 2], weights)
    logprobs = torch.zeros(len(batch.token_ids), requires_grad=True)
    grpo_loss(logprobs, batch)[0].backward()
    assert torch.allclose(logprobs.grad, -batch.advantages * batch.loss_mask / 10)


def test_rollout_importance_weights_of_each_mode():
    log_ratio = torch.tensor([math.log(3.0), math.log(0.5), math.log(2.5), math.log(2.9)])
    ids, mask = torch.tensor([0, 0, 1, 1]), torch.ones(4)
    weights = partial(rollout_weights, log_ratio, ids, mask, threshold=2.0)
    first, second = math.sqrt(3.0 * 0.5), math.sqrt(2.5 * 2.9)  # geometric means
    assert first < 2.0 < second
    assert weights(mode="token_truncate").tolist() == pytest.approx([2.0, 0.5, 2.0, 2.0])
    assert weights(mode="token_mask").tolist() == pytest.approx([0.0, 0.5, 0.0, 0.0])
    assert weights(mode="sequence_truncate").tolist() == pytest.approx([first, first, 2.0, 2.0])
    assert weights(mode="sequence_mask").tolist() == pytest.approx([3.0, 0.5, 0.0, 0.0])


def test_sft_loss_is_the_weighted_cross_entropy():
    batch = micro_batch([0, 1], [0.1, 0.1, 0.1])
    logprobs = torch.tensor([x for i in (0, 1) for x in [-9.0] * PROMPT + NEW[i]])
    assert sft_loss(logprobs, batch)[0].item() == pytest.approx(-0.1 * (sum(NEW[0]) + sum(NEW[1])), abs=1e-6)


def test_ipo_divides_by_the_number_of_tokens_whatever_they_weigh_in_other_losses():
    batch = micro_batch([0, 1], [1.0, 1.0, 0.0], ref_logprobs=REF)
    logprobs = torch.tensor([x for i in (0, 1) for x in [0.0] * PROMPT + NEW[i]])
    losses = [
        dpo_loss(logprobs, replace(batch, loss_mask=scale * batch.loss_mask), loss_type="ipo", beta=0.1, mean_chosen_length=3)[0]
        for scale in (1, 2)
    ]
    margin = sum(NEW[0]) / 3 - sum(REF[0]) / 3 - sum(NEW[1]) / 5 + sum(REF[1]) / 5
    assert losses[0].item() == pytest.approx((margin - 1 / 0.2) ** 2, rel=1e-5)
    assert losses[0] == losses[1]
