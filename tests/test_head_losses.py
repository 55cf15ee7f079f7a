"""Losses on heads without a model: metrics against counting by hand, and that padding and repetitions count for nothing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rlhf.head_losses import (
    classification_loss,
    embedding_loss,
    embedding_values,
    relevant_ranks,
    reranker_loss,
    rm_loss,
)
from rlhf.records import MicroBatch


def batch(targets, weights, *, keys=None, values=None) -> MicroBatch:
    """A micro batch as far as these losses read it."""
    count = len(targets)
    nothing = torch.zeros(count)
    return MicroBatch(
        token_ids=nothing, position_ids=nothing, cu_seqlens=nothing, labels=nothing, loss_mask=nothing, weights=nothing,
        advantages=nothing, sequence_ids=nothing, num_tokens=0, num_sequences=count,
        sequence_weights=torch.tensor(weights), targets=torch.tensor(targets),
        keys=torch.tensor(keys if keys is not None else range(count)), batch_values=values,
    )  # fmt: skip


def test_a_reward_models_metrics_are_means_over_pairs():
    scores = torch.tensor([[2.0], [1.0], [0.0], [3.0], [9.0], [9.0], [7.0]])  # the third pair is a repetition, then padding
    loss, metrics = rm_loss(scores, batch([[0.5]] * 4 + [[0.0]] * 3, [0.5] * 4 + [0.0] * 3))
    assert loss.item() == pytest.approx((torch.tensor([0.5, -3.5]).neg().exp() + 1).log().mean().item())
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {"rewards/chosen": 1.0, "rewards/rejected": 2.0, "rewards/accuracies": 0.5, "rewards/margins": -1.0}
    )


@pytest.mark.parametrize("kind, targets, accuracy", [
    ("single_label_classification", [[1.0], [0.0], [0.0]], 0.5),
    ("multi_label_classification", [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], 0.5),
    ("regression", [[-1.0, 2.0], [3.0, 1.0], [0.0, 0.0]], None),
])  # fmt: skip
def test_classification(kind, targets, accuracy):
    logits = torch.tensor([[-1.0, 2.0], [-0.5, 1.0], [5.0, 5.0]])
    loss, metrics = classification_loss(logits, batch(targets, [0.5, 0.5, 0.0]), problem_type=kind)
    labels = torch.tensor(targets[:2])
    functional = torch.nn.functional
    expected = {
        "single_label_classification": lambda: functional.cross_entropy(logits[:2], labels[:, 0].long()),
        "multi_label_classification": lambda: functional.binary_cross_entropy_with_logits(logits[:2], labels),
        "regression": lambda: functional.mse_loss(logits[:2], labels),
    }[kind]()
    assert loss.item() == pytest.approx(expected.item())
    assert metrics.get("accuracy", accuracy) == accuracy


def test_ranks_of_the_relevant_documents():
    scores = torch.tensor([3.0, 1.0, 2.0, 0.0, 5.0, 1.0, 1.0])
    labels = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    assert relevant_ranks(scores, labels).tolist() == [1, 2, 2]  # equal scores are no hit


def test_a_rerankers_metrics_are_means_over_groups_whatever_the_split():
    scores = torch.tensor([[3.0], [1.0], [0.0], [5.0], [4.0], [9.0]])
    targets, weights = [[1.0], [0.0], [1.0], [0.0], [0.0], [0.0]], [0.5] * 5 + [0.0]  # the last one is padding
    for loss_type in ("pointwise_reranker", "listwise_reranker"):
        loss_of = partial(reranker_loss, loss_type=loss_type, num_documents=5, num_groups=2, num_trained_groups=2)
        loss, metrics = loss_of(scores, batch(targets, weights))
        assert metrics["accuracy"].item() == 0.5 and metrics["mrr"].item() == pytest.approx((1 + 1 / 3) / 2)
        parts = [loss_of(scores[part], batch(targets[part], weights[part])) for part in (slice(0, 2), slice(2, 6))]
        assert sum(part.item() for part, _ in parts) == pytest.approx(loss.item())
        assert sum(metrics["mrr"].item() for _, metrics in parts) == pytest.approx(metrics["mrr"].item())


def test_small_groups_are_not_trained_listwise():
    scores = torch.tensor([[3.0], [1.0], [0.0]])
    options = {"num_documents": 3, "num_groups": 2, "num_trained_groups": 1, "min_group_size": 2}
    loss, _ = reranker_loss(scores, batch([[1.0], [0.0], [1.0]], [0.5] * 3), loss_type="listwise_reranker", **options)
    assert loss.item() == pytest.approx(-scores[:2, 0].log_softmax(0)[0].item())


def test_recall_is_over_the_candidates_of_the_whole_batch():
    """Three rows of anchor and positive; the third anchor's nearest candidate is the first one's positive."""
    angles = torch.tensor([0.0, 0.1, 1.0, 1.3, -0.2, 3.0])
    embeddings = torch.stack([angles.cos(), angles.sin()], 1)
    targets = [[1.0, 1.0], [0.0, 1.0]] * 3
    whole = embedding_values(embeddings, batch(targets, [1 / 3] * 6))
    for split in ([range(6)], [range(4), range(4, 6)], [range(0, 2), range(2, 4), range(4, 6)]):
        recall = 0.0
        for part in map(list, split):
            micro_batch = batch([targets[i] for i in part], [1 / 3] * len(part), keys=part, values=whole)
            recall += embedding_loss(embeddings[part], micro_batch, loss_type="infonce", in_batch=True)[1]["recall@1"].item()
        assert recall == pytest.approx(2 / 3)


def test_only_pairs_that_belong_together_count_for_the_recall():
    angles = torch.tensor([0.0, 0.1, 1.0, 2.0])
    embeddings, targets = torch.stack([angles.cos(), angles.sin()], 1), [[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
    micro_batch = batch(targets, [0.5] * 4)
    whole = embedding_values(embeddings, micro_batch)
    _, metrics = embedding_loss(embeddings, batch(targets, [0.5] * 4, values=whole), loss_type="contrastive")
    assert metrics["recall@1"].item() == 1.0
    assert embedding_loss(embeddings, micro_batch, loss_type="contrastive")[1] == {}


@pytest.mark.parametrize("in_batch", [True, False])
def test_held_out_rows_in_parts_give_the_loss_of_all_and_no_comparison_is_made_twice(in_batch):
    """Four rows of an anchor, its positive and a negative; the multiplications of all parts together are those of one."""
    embeddings = torch.nn.functional.normalize(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    targets, weights = [[1.0, 1.0], [0.0, 1.0], [0.0, 1.0]] * 4, [0.25] * 12
    whole = embedding_values(embeddings, batch(targets, weights))
    options = {"include_qq": True, "include_dd": True, "mask_fake_negative": True} if in_batch else {}
    found = []
    for split in ([range(12)], [range(3), range(3, 12)], [range(start, start + 3) for start in (0, 3, 6, 9)]):
        loss = 0.0
        with FlopCounterMode(display=False) as counter:
            for part in map(list, split):
                micro_batch = batch([targets[i] for i in part], [0.25] * len(part), keys=part, values=whole)
                loss += embedding_loss(embeddings[part], micro_batch, loss_type="infonce", in_batch=in_batch, **options)[0].item()
        found.append((loss, counter.get_total_flops()))
    assert found[0][1] > 0
    assert [flops for _, flops in found] == [found[0][1]] * 3
    assert [loss for loss, _ in found] == pytest.approx([found[0][0]] * 3)
    micro_batch = batch(targets, weights, values=whole)
    trained, _ = embedding_loss(embeddings.requires_grad_(), micro_batch, loss_type="infonce", in_batch=in_batch, **options)
    assert found[0][0] == pytest.approx(trained.item())
